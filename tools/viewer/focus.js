// The keyboard's place: it stays where it was when a view is drawn anew, and each group has one stop for Tab.

import {$} from "./dom.js";
import {watchChoice} from "./state.js";

const PLACES = ["controls", "picture", "thumbs", "panels", "list", "map", "tokens"];
const GROUPS = {  // of elements that are one stop: the chosen one
  tokens: ["button", "aria-pressed"], list: ["[data-tensor]", "aria-current"],
  map: ["[data-tensor]", "aria-current"], thumbs: ["button", "aria-pressed"],
};
const STOPS = "button:not(:disabled), canvas[tabindex], select, input, td[tabindex], a[href]";

let last = null;  // where the keyboard is, or was when that was taken away

function describe(target) {
  const place = PLACES.map($).find(one => one?.contains(target) && one !== target);
  if (!place) return null;
  const alike = [...place.querySelectorAll(target.tagName)];
  return {target, id: place.id, tag: target.tagName, nth: alike.indexOf(target), label: target.ariaLabel,
    tensor: target.dataset.tensor, text: target.textContent};
}

function sameAs({id, tag, nth, label, tensor, text}) {  // what stands there now
  const all = [...$(id).querySelectorAll(tag)].filter(one => !one.disabled);
  return all.find(one => tensor ? one.dataset.tensor === tensor : false) ?? all.find(one => label && one.ariaLabel === label)
    ?? all.find(one => text && !label && one.textContent === text) ?? $(id).querySelectorAll(tag)[nth];
}

const isLost = () => last && !last.target.isConnected
  && [document.body, null].includes(document.activeElement);
function restore() {
  if (!isLost()) return;
  const found = sameAs(last);
  if (found && !found.disabled) found.focus({preventScroll: true});
}
function settle() {  // all is drawn: what had it is gone, so its neighbour gets it
  restore();
  if (!isLost()) return;
  const [first] = $(last.id).querySelectorAll(STOPS);
  first?.focus({preventScroll: true});
}

// In a group the chosen one can be reached with Tab; if the keyboard is in it, it goes along.
function rove() {
  for (const [id, [each, how]] of Object.entries(GROUPS)) {
    const all = [...$(id).querySelectorAll(each)], chosen = all.find(one => one.getAttribute(how) === "true") ?? all[0];
    for (const one of all) if (one.tabIndex !== (one === chosen ? 0 : -1)) one.tabIndex = one === chosen ? 0 : -1;
    const held = document.activeElement;
    if (chosen && held !== chosen && all.includes(held)) chosen.focus({preventScroll: true});
  }
}

export function followFocus() {
  addEventListener("focusin", ({target}) => { last = describe(target); });
  addEventListener("focusout", ({target}) => setTimeout(() => {  // left, and not taken away
    if (last?.target === target && target.isConnected && document.activeElement === document.body) last = null;
  }));
  new MutationObserver(changes => {
    if (changes.some(({target}) => target.id === "thumbs")) rove();
    const drawn = changes.some(({type}) => type === "attributes") && $("picture").ariaBusy === "false";
    if (drawn) settle();
    else restore();
  }).observe(document.querySelector("body"),
    {childList: true, subtree: true, attributes: true, attributeFilter: ["aria-busy"]});
  watchChoice(rove);
}
