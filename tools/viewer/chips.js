// The tokens of the prompt, on top: of the trace that is shown.

import {$, element} from "./dom.js";
import {choose, current, now, tokenIds, tokenName, tokenText, watchChoice} from "./state.js";

const MOST = 2000;
let shown = "";  // the ids whose chips there are, and the trace whose texts

function build() {
  const ids = tokenIds(), key = `${now.traces.indexOf(current())} ${current().name} ${ids}`;
  if (key === shown) return;
  shown = key;
  const prompt = +(current().about.prompt_tokens ?? Infinity);  // what follows was generated
  const title = i => `position ${i}, id ${ids[i]}${i < prompt ? "" : ", generated"}`;
  $("tokens").replaceChildren(...ids.slice(0, MOST).map((id, i) => element("button",
    {title: title(i), ariaLabel: `position ${i}, ${tokenName(i)}${i < prompt ? "" : ", generated"}`,
      className: i < prompt ? "" : "generated", onclick: () => choose({token: i})},
    tokenText(i).replaceAll("\n", "⏎"))));
}

function mark() {
  const strip = $("tokens"), chips = [...strip.children];
  chips.forEach((chip, i) => chip.setAttribute("aria-pressed", i === now.token));
  const chip = chips[now.token];
  if (!chip) return;
  const left = chip.offsetLeft - strip.offsetLeft - strip.scrollLeft, right = left + chip.offsetWidth;
  strip.scrollLeft += Math.min(0, left - 40) + Math.max(0, right + 40 - strip.clientWidth);
}

const STEPS = {ArrowLeft: token => token - 1, ArrowRight: token => token + 1, Home: () => 0, End: () => Infinity};
export function followInChips() {
  $("tokens").addEventListener("keydown", event => {  // among the tokens the arrows go from one to the next
    if (!(event.key in STEPS) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    const at = [...$("tokens").children].indexOf(event.target), token = STEPS[event.key](at < 0 ? now.token : at);
    choose({token: Math.max(0, Math.min(tokenIds().length - 1, token))}, {replace: event.repeat});
  });
  watchChoice(() => {
    build();
    mark();
  });
}
