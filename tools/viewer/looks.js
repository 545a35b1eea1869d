// What else there is to see of a tensor than its picture, and the ways there.

import {$, element} from "./dom.js";
import {LENS, isAttention, isStream, layerOf} from "./model.js";
import {choose, layers, now, watchChoice} from "./state.js";

const PLAIN = ["", "numbers"];
export function looksOf(name) {  // [key, words]; none where there is nothing to choose
  if (isAttention(name)) return [["", "this head"], ["heads", "all heads"]];
  return isStream(name) ? [PLAIN, ["stream", "stream"]] : [];
}
export const lookOf = name => looksOf(name).some(([key]) => key === now.look) ? now.look : "";

export function lookButtons(name) {
  const looks = looksOf(name);
  if (!looks.length) return [];
  const buttons = looks.map(([look, words]) => {
    const button = element("button", {onclick: () => choose({look})}, words);
    button.dataset.look = look;
    button.setAttribute("aria-pressed", look === lookOf(name));
    return button;
  });
  return [element("span", {className: "looks", role: "group", ariaLabel: "what to see of it"}, ...buttons)];
}

const isNow = (name, look) => now.name === name && lookOf(name) === look;
const inLayer = part => `layers.${layerOf(now.name) ?? Math.floor(layers() / 2)}.${part}`;
const SIGHTS = [  // words, tensor, look
  ["who looks at whom", () => inLayer("attention.probs"), ""],
  ["all heads", () => inLayer("attention.probs"), "heads"],
  ["what each layer would say", () => LENS, ""],
  ["the residual stream", () => inLayer("out"), "stream"],
  ["how RoPE turns", () => inLayer("attention.q_rotated"), ""],
];

export function followInSights() {
  watchChoice(() => {
    const focused = $("sights").contains(document.activeElement) && document.activeElement.textContent;
    const buttons = SIGHTS.filter(([, nameOf]) => now.names.includes(nameOf())).map(([words, nameOf, look]) => {
      const name = nameOf(), button = element("button", {onclick: () => choose({name, look})}, words);
      button.setAttribute("aria-pressed", isNow(name, look));
      return button;
    });
    $("sights").replaceChildren(...buttons);
    buttons.find(button => button.textContent === focused)?.focus({preventScroll: true});
  });
}
