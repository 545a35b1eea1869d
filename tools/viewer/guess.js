// How a number of the logit lens came about: of which stream it is, and what else the layer would say.

import {element, link, percent} from "./dom.js";
import {LENS} from "./model.js";
import {bars} from "./picture.js";
import {read} from "./safetensors.js";
import {cellChoice, choose, current, isDifference, now, quoted, tokenName} from "./state.js";

// Rows of the lens: of each layer what it would say, and what its attention alone would.
export const guessAt = (layer, attention, position) => [2 * layer + (attention ? 1 : 0), position];

async function guessesOf(trace, kind, layer, position) {  // [id, probability] of the likeliest
  const [, B, T, top] = trace.tensors.get(`${kind}.ids`).shape;
  const first = ((layer * B + Math.min(now.row, B - 1)) * T + position) * top;
  const [ids, probs] = await Promise.all(["ids", "probs"].map(what => read(trace, `${kind}.${what}`, first, top)));
  return Array.from(ids, (id, n) => [id, probs[n]]);
}

function wayOf(stream, layer, position) {  // the steps from the stream to the guess, those of the trace to be clicked
  const go = (name, row) => now.names.includes(name) ? link(name, () => choose({name, ...cellChoice(row, 0, name)})) : name;
  const last = layer === current().tensors.get("lens.ids").shape[0] - 1 && stream.endsWith(".out");
  const words = ["The stream of this token there, ", go(stream, position), ", goes through the final norm and meets each "
    + "token's row of the head, as if no layer came after it: that gives a logit z for each, and of it e^z / Σ e^z is the "
    + "probability. "];
  if (last) words.push("No layer does come after it: these are the model's own ", go("logits", position), ".");
  return words;
}

export const guessPanel = {
  title: "How this number came about",
  fits: ({name}) => name === LENS && now.cell !== null,
  async draw({still}, place) {
    const [row, position] = now.cell, layer = Math.floor(row / 2), attention = row % 2 === 1;
    const trace = current(), kind = attention ? "lens.attention" : "lens";
    place.classList.add("cell");
    place.append(element("button", {className: "close", ariaLabel: "close the number", onclick: () => choose({cell: null})}, "×"));
    if (isDifference() || !trace.tensors.has(`${kind}.ids`)) {
      place.append(element("p", {}, "Words have no difference: choose one of the two traces."));
      return;
    }
    const guesses = await guessesOf(trace, kind, layer, position);
    if (!still()) return;
    const stream = `layers.${layer}.${attention ? "after_attention" : "out"}`;
    place.append(element("p", {}, element("b", {}, `After ${tokenName(position)}, layer ${layer}${attention ? "'s attention" : ""}`),
      `: ${quoted(guesses[0][0])} ${percent(guesses[0][1])} %`),
    element("p", {}, ...wayOf(stream, layer, position)),
    bars(guesses.map(([id, p]) => [quoted(id), p, `${percent(p)} %`])));
  },
};
