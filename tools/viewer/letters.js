// The letters of the dims, each in its colour, with the size that it has.

import {element} from "./dom.js";
import {LETTERS, dimsOf, sizesOf} from "./model.js";

const PARAMS = {D: "dim", L: "n_layers", H: "n_heads", K: "n_kv_heads", E: "head_dim", F: "ffn_dim", V: "vocab_size"};
export const SHORT = {
  B: "batch", T: "tokens", S: "positions", D: "model dim", H: "heads", K: "k/v heads", G: "a group", E: "head dim",
  F: "units", V: "vocabulary", L: "layers",
};

// The sizes that a trace's tensors have, and beside them what its params tell of those that it lacks.
export function knownSizes(trace) {
  const sizes = sizesOf(trace);
  for (const [letter, key] of Object.entries(PARAMS)) {
    const told = trace.params[key];
    if (!Number.isInteger(told)) continue;
    if (letter === "L") sizes.L = Math.max(sizes.L, told);
    else sizes[letter] ??= told;
  }
  if (sizes.H && sizes.K) sizes.G ??= sizes.H / sizes.K;
  return sizes;
}

export function letterOf(letter) {
  const made = element("b", {className: "letter", title: LETTERS[letter] ?? ""}, letter);
  made.dataset.letter = letter;
  return made;
}

// [letter, size] of each dim of a tensor; without a shape the sizes are those known.
export function dimsWithSizes(name, shape, sizes) {
  const letters = dimsOf(name).split(" ").filter(Boolean);
  if (!shape) return letters.map(letter => [letter, sizes[letter] ?? "?"]);
  const own = letters.slice(Math.max(0, letters.length - shape.length));  // some leave the batch away
  return shape.map((size, i) => [shape.length === own.length ? own[i] : "", size]);
}
export const dimsText = pairs => pairs.map(([letter, size]) => `${letter} ${size}`.trim()).join(" × ");
export function dimsElement(pairs) {
  const made = element("span", {className: "dims", title: dimsText(pairs)});
  for (const [letter, size] of pairs)
    made.append(element("span", {}, ...(letter ? [letterOf(letter)] : []), `${size}`), " ");
  return made;
}
