// What a tensor is for, its formula, the lines of the script that make it, what it is made of and goes into.

import {$, element, link} from "./dom.js";
import {LENS, inLayer, inputsOf, layerOf, matricesOf, outputsOf, partOf} from "./model.js";
import {choose, infoOf, now} from "./state.js";

const i = name => `<i>${name}</i>`, sub = (name, below) => `<i>${name}</i><sub>${below}</sub>`;
const norm = (to, from, weight) => `${sub(to, "t")} = ${sub(from, "t")} / rms(${sub(from, "t")}) × ${i(weight)}, `
  + `&ensp;rms(${i("x")}) = √(mean of ${i("x")}<sup>2</sup> + ε)`;
const turned = to => `(${sub(to, "2n")}, ${sub(to, "2n+1")}) at position ${i("t")}, turned by the angle ${i("t")} · `
  + `${sub("f", "n")}, &ensp;${sub("f", "n")} = θ<sup>−2n/E</sup> `
  + "(long waves are stretched where RoPE is scaled)";

// By part: what it is for; its formula; the weight it needs, if any.
const MEANINGS = {
  tokens: ["The prompt as numbers: for each piece of the text, its place in the vocabulary."],
  tok_embeddings: ["Each token's own vector, looked up in a table. Here the residual stream begins.",
    `${sub("x", "t")} = row ${sub("token", "t")} of ${i("W")}`, "tok_embeddings.weight"],
  attention_norm: ["The residual stream, scaled so that every token speaks equally loud. Attention reads this; "
    + "the stream itself goes on unchanged.", norm("h", "x", "w"), "attention_norm.weight"],
  "attention.q": ["What each token asks of those before it, head by head: its query.",
    `${sub("q", "h,t")} = ${sub("W", "q,h")} · ${sub("h", "t")}`, "attention.wq.weight"],
  "attention.k": ["What each token can be found by: its key. G query heads share one.",
    `${sub("k", "j,t")} = ${sub("W", "k,j")} · ${sub("h", "t")}`, "attention.wk.weight"],
  "attention.v": ["What each token has to give to those who look at it: its value. G query heads share one.",
    `${sub("v", "j,t")} = ${sub("W", "v,j")} · ${sub("h", "t")}`, "attention.wv.weight"],
  "attention.q_rotated": ["The query, each pair of its numbers turned by an angle that grows with the position. "
    + "So q · k depends on how far apart two tokens stand.", turned("q")],
  "attention.k_rotated": ["The key, each pair of its numbers turned by an angle that grows with the position. "
    + "So q · k depends on how far apart two tokens stand.", turned("k")],
  "attention.scores": ["How well the key of token s answers the query of token t; −∞ at later tokens, at which "
    + "none may look.", `${sub("score", "h,t,s")} = ${sub("q", "h,t")} · ${sub("k", "⌊h/G⌋,s")} / √E, `
    + `&ensp;−∞ where ${i("s")} &gt; ${i("t")}`],
  "attention.probs": ["Each token's attention, shared out among the tokens up to it: a row adds up to 1.",
    `${sub("p", "h,t,s")} = e<sup>score<sub>h,t,s</sub></sup> / Σ<sub>j</sub> e<sup>score<sub>h,t,j</sub></sup>`],
  "attention.heads": ["What each head read: the mean of the values, weighted by the attention.",
    `${sub("head", "h,t")} = Σ<sub>s</sub> ${sub("p", "h,t,s")} · ${sub("v", "⌊h/G⌋,s")}`],
  "attention.out": ["What attention adds to the stream: all heads side by side, mixed by one matrix.",
    `${sub("out", "t")} = ${sub("W", "o")} · (${sub("head", "0,t")}, …, ${sub("head", "H−1,t")})`,
    "attention.wo.weight"],
  after_attention: ["The residual stream, with what attention added.",
    `${sub("x", "t")} + ${sub("out", "t")}`],
  ffn_norm: ["The residual stream, scaled once more so that every token speaks equally loud, for the "
    + "feed-forward.", norm("h", "x", "w"), "ffn_norm.weight"],
  "feed_forward.gate": ["For each of the F units: how much of it passes. Near 0 it is shut.",
    `${sub("gate", "t")} = silu(${sub("W", "1")} · ${sub("h", "t")}), &ensp;silu(${i("z")}) = ${i("z")} / (1 + e<sup>−z</sup>)`,
    "feed_forward.w1.weight"],
  "feed_forward.up": ["For each of the F units: what it has to say, if its gate lets it.",
    `${sub("up", "t")} = ${sub("W", "3")} · ${sub("h", "t")}`, "feed_forward.w3.weight"],
  "feed_forward.hidden": ["What each unit says: what it has to say, times its gate.",
    `${sub("hidden", "t")} = ${sub("gate", "t")} × ${sub("up", "t")}, &ensp;unit by unit`],
  "feed_forward.out": ["What the feed-forward adds to the stream: each unit has a vector of its own, and adds as "
    + "much of it as it says.", `${sub("out", "t")} = ${sub("W", "2")} · ${sub("hidden", "t")}`,
    "feed_forward.w2.weight"],
  out: ["The residual stream after this layer: what the next one reads.", `${sub("x", "t")} + ${sub("out", "t")}`],
  norm: ["The stream after the last layer, scaled for the head.", norm("h", "x", "w"), "norm.weight"],
  logits: ["A number for each token of the vocabulary: the higher, the likelier it comes next.",
    `${sub("logit", "t,id")} = ${sub("h", "t")} · ${sub("w", "id")}, &ensp;row ${i("id")} of the head`,
    "output.weight"],
  [LENS]: ["If a layer were the last, what would come next? Its output goes through the final norm and the head.",
    `softmax(${sub("W", "head")} · norm(${sub("x", "layer,t")}))`],
};

const meaningOf = name => MEANINGS[partOf(name)] ?? [];
export function weightOf(name) {  // the name of the weight that a tensor is made with, or nothing
  const [, , weight] = meaningOf(name);
  return weight && (inLayer(name) ? `layers.${layerOf(name)}.${weight}` : weight);
}

// A query head belongs to one key/value head, a key/value head to the first of its query heads.
export function headsOf(name, shape) {  // a tensor without a batch axis has its heads first
  const {n, heads, perHead} = matricesOf(name, shape);
  return perHead || shape.length !== 3 || !/^attention\.(q|k|v|scores|probs|heads)/.test(partOf(name)) ? heads : n;
}
export function matrixIn(other, name, matrix) {  // of another tensor the matrix that belongs to one of this
  const from = headsOf(name, infoOf(name).shape), to = headsOf(other, infoOf(other).shape);
  const row = Math.floor(matrix / from), head = matrix % from;
  return row * to + (to === from ? head : to < from ? Math.floor(head * to / from) : head * (to / from));
}

const SOURCE = JSON.parse($("source").textContent);
// Beside the sources there is something to link to; a page that somebody was sent stands alone.
const isHome = () => /\/tools\/viewer\.html$/.test(location.pathname);
function linkTo(file, anchor, text) {
  if (!isHome()) return element("span", {}, text);
  return element("a", {href: `../${file}#${anchor}`, target: "_blank", rel: "noopener"}, text);
}

const listing = (first, lines) => element("pre", {},
  ...lines.map((line, n) => element("span", {}, element("i", {}, `${first[n]}`.padStart(4)), `  ${line}\n`)));

function code(name) {
  const step = SOURCE.steps[partOf(name)];
  if (!step) return [];
  const numbers = step.lines.map(([number]) => number), last = numbers.at(-1);
  const made = element("p", {}, "Made in ", element("code", {}, "forward"), ", ",
    linkTo(SOURCE.script, `L${last}`, `${SOURCE.script}, line ${last}`), ":");
  const used = step.functions.map(key => {
    const {first, text} = SOURCE.functions[key], lines = text.split("\n");
    return element("details", {}, element("summary", {}, `${key}, line ${first}`),
      listing(lines.map((_, n) => first + n), lines));
  });
  return [made, listing(numbers, step.lines.map(([, line]) => line)), ...used];
}

function choices(words, names, from) {
  if (!names.length) return [];
  return [element("p", {}, words, ...names.flatMap((name, n) => [n ? ", " : "", link(name, () =>
    choose(infoOf(from) && infoOf(name) && headsOf(name, infoOf(name).shape) > 1
      ? {name, head: matrixIn(name, from, now.head)} : {name}))]))];
}

export const meaningPanel = {
  title: "What it is",
  fits: ({name}) => meaningOf(name).length > 0,
  draw({name}, place) {
    const [purpose, formula] = meaningOf(name), weight = weightOf(name), section = SOURCE.sections[partOf(name)];
    place.classList.add("meaning");
    place.append(element("p", {}, purpose));
    if (formula) place.append(element("p", {className: "formula", innerHTML: formula}));
    if (weight) place.append(element("p", {}, "Its weight: ", element("code", {}, weight)));
    place.append(...code(name), ...choices("Made of ", inputsOf(name, now.names), name),
      ...choices("Goes into ", outputsOf(name, now.names), name));
    if (section) place.append(element("p", {}, "Told in the walkthrough: ",
      linkTo(SOURCE.walkthrough, section.anchor, section.heading)));
  },
};
