// The residual stream: how large it is after each block, and what each block added to it.

import {legend} from "./colors.js";
import {element, readout, show} from "./dom.js";
import {lookOf} from "./looks.js";
import {layerOf, matricesOf, partOf} from "./model.js";
import {bars, heat} from "./picture.js";
import {read} from "./safetensors.js";
import {chosenRange} from "./sheet.js";
import {choose, infoOf, isDifference, isHere, layers, now, tokenName, values} from "./state.js";

const KINDS = {
  size: ["its size", "length of the stream after each block"],
  added: ["what was added", "length of what each block added"],
  share: ["added, relative", "length of what was added, divided by that of the stream before"],
  turn: ["its direction", "cosine between what was added and the stream before: below 0 it takes away"],
};
const APART = {apart: ["how far apart", "length of the difference of the two traces, divided by the first's"]};

function blocks() {  // [words, the stream after it, what it added]
  const all = [["embedding", "tok_embeddings", ""]];
  for (let i = 0; i < layers(); i++) all.push(
    [`layer ${i} attn`, `layers.${i}.after_attention`, `layers.${i}.attention.out`],
    [`layer ${i} ffn`, `layers.${i}.out`, `layers.${i}.feed_forward.out`]);
  return all.filter(([, stream]) => isHere(stream));
}

function lengths(data, D) {
  return Float64Array.from({length: data.length / D}, (_, t) => {
    let sum = 0;
    for (let i = t * D; i < (t + 1) * D; i++) sum += data[i] * data[i];
    return Math.sqrt(sum);
  });
}
function products(a, b, D) {
  return Float64Array.from({length: a.length / D}, (_, t) => {
    let sum = 0;
    for (let i = t * D; i < (t + 1) * D; i++) sum += a[i] * b[i];
    return sum;
  });
}

function together({size, added, dots}, before) {  // the kinds' numbers of one block, a number a token
  const T = size.length, none = new Float64Array(T).fill(NaN);
  if (!added || !before) return {size, added: none, share: none, turn: none};
  return {size, added, share: added.map((x, t) => x / before[t]), turn: dots.map((x, t) => x / added[t] / before[t])};
}

let known = {traces: null, found: new Map()};
async function measured(still, tell) {
  if (known.traces !== now.traces) known = {traces: now.traces, found: new Map()};
  const key = `${now.side} ${now.row}`;
  if (known.found.has(key)) return known.found.get(key);
  const rows = [];
  let before = null;
  for (const [words, stream, addition] of blocks()) {
    const {size, cols: D} = matricesOf(stream, infoOf(stream).shape), first = now.row * size;
    tell(words);
    const after = await values(stream, first, size);
    if (isDifference()) {
      const own = lengths(await read(now.traces[0], now.both.tensors.get(stream)[0], first, size), D);
      rows.push({words, stream, apart: lengths(after, D).map((x, t) => x ? x / own[t] : 0)});
    } else {
      const same = before && before.length === after.length;
      const added = !same ? null : isHere(addition) && infoOf(addition).count === infoOf(stream).count
        ? await values(addition, first, size) : after.map((x, i) => x - before[i]);
      rows.push({words, stream, ...together({size: lengths(after, D), added: added && lengths(added, D),
        dots: added && products(added, before, D)}, same && lengths(before, D))});
    }
    before = after;
    if (!still()) return null;
  }
  known.found.set(key, rows);
  return rows;
}

const how = {kind: "size"};
function picks(kinds, kind, change) {
  return element("div", {className: "choices", role: "group", ariaLabel: "number shown"},
    ...Object.entries(kinds).map(([key, [title]]) => {
      const button = element("button", {onclick: () => change(key)}, title);
      button.setAttribute("aria-pressed", key === kind);
      button.dataset.kind = key;
      return button;
    }));
}

export const streamPicture = {
  fits: ({name}) => lookOf(name) === "stream",
  async draw(view) {
    const {name, picture, still} = view, kinds = isDifference() ? APART : KINDS, progress = element("p", {role: "status"});
    picture.replaceChildren(progress);
    const rows = await measured(still, words => { progress.textContent = `Reading ${words} …`; });
    if (!rows || !still()) return;
    const T = rows[0][Object.keys(kinds)[0]].length;
    view.ranged = true;
    view.table = () => [["after", "position", "token", ...Object.keys(kinds)], ...rows.flatMap(row =>
      Array.from({length: T}, (_, t) => [row.words, t, tokenName(t), ...Object.keys(kinds).map(key => row[key][t])]))];
    function draw(key) {
      how.kind = key;
      readout("");
      const kind = key in kinds ? key : Object.keys(kinds)[0], [, meaning] = kinds[kind];
      const some = ["size", "apart"].includes(kind) ? rows : rows.filter(row => !Number.isNaN(row.added[0]));
      const down = [...some].reverse(), data = Float64Array.from(down.flatMap(row => [...row[kind]]));
      const most = chosenRange(data.filter((x, i) => T < 3 || i % T), kind === "turn");
      const chosen = down.findIndex(({stream}) => stream === name
        || (layerOf(stream) === layerOf(name) && partOf(name) === (partOf(stream) === "out" ? "feed_forward.out" : "attention.out")));
      const map = heat(data, down.length, T, {range: most, rowName: i => down[i].words, colName: tokenName, mark: chosen,
        label: `the residual stream, ${meaning}`, pick: (i, t) => choose({name: down[i].stream, token: t}),
        words: (i, t, x) => `${tokenName(t)} after ${down[i].words}: ${show(x)}`});
      const at = Math.min(now.token, T - 1), beyond = T > 2 && down.some((row, i) => data[i * T] > most.most);
      picture.replaceChildren(picks(kinds, kind, next => {
        draw(next);
        picture.querySelector(`[data-kind=${next}]`).focus({preventScroll: true});
      }), element("p", {}, `The residual stream, ${meaning}; from the embedding below to the last layer above.`), map,
      legend(most, beyond ? `the first token reaches up to ${show(Math.max(...down.map((row, i) => data[i * T])))}` : ""),
      element("h3", {}, `At ${tokenName(at)}, block by block`),
      bars(some.map(row => [row.words, row[kind][at], show(row[kind][at])])));
    }
    draw(how.kind);
  },
};
