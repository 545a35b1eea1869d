// The tokens of the prompt, on top.

import {$, element} from "./dom.js";
import {choose, current, now, textOf, tokenIds, watchChoice} from "./state.js";

const MOST = 2000;
let shown = null;  // the ids whose chips there are

function build() {
  const ids = tokenIds();
  if (ids === shown) return;
  shown = ids;
  const prompt = +(current().about.prompt_tokens ?? Infinity);  // what follows was generated
  $("tokens").replaceChildren(...ids.slice(0, MOST).map((id, i) => element("button",
    {title: `position ${i}, id ${id}${i < prompt ? "" : ", generated"}`,
      className: i < prompt ? "" : "generated", onclick: () => choose({token: i})},
    (textOf(id) ?? `#${id}`).replaceAll("\n", "⏎"))));
}

function mark() {
  const strip = $("tokens"), chips = [...strip.children];
  chips.forEach((chip, i) => chip.setAttribute("aria-pressed", i === now.token));
  const chip = chips[now.token];
  if (!chip) return;
  const left = chip.offsetLeft - strip.offsetLeft - strip.scrollLeft, right = left + chip.offsetWidth;
  strip.scrollLeft += Math.min(0, left - 40) + Math.max(0, right + 40 - strip.clientWidth);
}

export function followInChips() {
  watchChoice(() => {
    build();
    mark();
  });
}
