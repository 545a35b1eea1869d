// What is opened and chosen. Whatever changes goes through choose(), which tells those who watch.

import {partsOfCharacters} from "./characters.js";
import {pairOf} from "./layouts.js";
import {read} from "./safetensors.js";
import {LENS, dimsOf, isPaired, layerCount, layerOf, matricesOf, partOf} from "./model.js";

export const now = {
  traces: [],  // one, or two that are compared: change them with setTraces()
  reference: 0,  // of two traces the one that errors are relative to
  both: null,  // of two traces: what can be compared, as pairOf() says
  origin: "file",  // or "page": it came inside this page; or "example": the one that always does
  names: [],  // of all tensors, in the order of the pass
  name: "",  // of the chosen tensor
  head: 0,  // of its matrices the chosen one: head, and row of the batch before it
  wanted: [0, 0],  // row of the batch and query head last chosen, also where a tensor has fewer
  pair: 0,  // of the dims of q and k
  token: 0,  // position in the prompt
  cell: null,  // or [row, column] in the chosen matrix: the number whose making is shown
  row: 0,  // of the batch
  side: 0,  // trace 0, 1, or 2: their difference
  look: "",  // what is shown of it, of looksOf(name)
  overlay: [],  // heads that are lit together with others in the text; none: the chosen one alone
  zoom: null,  // the part of matrices of one shape that is shown: {of, top, left, rows, cols}
  reach: "",  // how far the colours reach, as reachOf() reads it
};
export const SIDES = ["a", "b", "difference"];

export const isDifference = () => now.side === 2;
export const current = () => now.traces[now.side] ?? now.traces[0];
export function setTraces(traces, reference) {
  Object.assign(now, {traces, reference, both: traces.length > 1 ? pairOf(traces) : null});
}
export function tokenIds() {  // of the difference: those that both have
  const ids = current().rows[now.row] ?? current().rows[0];
  if (!isDifference() || !now.both.common) return ids;
  return (ids.length ? ids : now.traces[1].rows[now.row] ?? ids).slice(0, now.both.common);
}
export const sameShape = name => now.both?.tensors.has(name) ?? false;  // and so it can be compared
export const infoOf = name => (isDifference() ? now.both.tensors.get(name)?.[0] : current().tensors.get(name))
  ?? now.traces.find(trace => trace.tensors.has(name))?.tensors.get(name);
export const isHere = name => isDifference() ? sameShape(name) : current().tensors.has(name);
export const layers = () => layerCount(now.names);
export const layersHere = () =>
  [...new Set(now.names.map(layerOf))].filter(layer => layer !== undefined).sort((a, b) => a - b);
export function layersOfModel() {  // how many it has; undefined where a part of a pass does not tell
  const told = now.traces.map(({params}) => params.n_layers).find(Number.isInteger), count = layersHere().length;
  const whole = count === layers() && ["norm", "logits"].some(name => now.names.includes(name));
  return told ?? (whole ? count : undefined);
}

// Numbers of the side that is looked at, or the difference of the two.
export async function values(name, first, count) {
  if (!isDifference()) return read(current(), name, first, count);
  const infos = now.both.tensors.get(name);
  const [a, b] = await Promise.all(now.traces.map((trace, side) => read(trace, infos[side], first, count)));
  return Float64Array.from(a, (x, i) => x === b[i] ? 0 : x - b[i]);
}

// Texts are of the side that is shown: two traces may have two vocabularies.
export const textOf = (id, trace = current()) => trace.texts[id]
  ?? (now.traces.every(({texts}) => !Object.keys(texts).length || texts === trace.texts || agree(texts, trace.texts))
    ? now.traces.map(({texts}) => texts[id]).find(text => text !== undefined) : undefined);
const agreeing = new WeakMap();
function agree(a, b) {  // is it one vocabulary, as far as both know it?
  const known = agreeing.get(a) ?? new Map();
  agreeing.set(a, known);
  if (!known.has(b)) known.set(b, Object.keys(a).every(id => !(id in b) || a[id] === b[id]));
  return known.get(b);
}
export const quoted = (id, trace) => textOf(id, trace) === undefined ? `#${id}`
  : JSON.stringify(textOf(id, trace)).replaceAll("\\\\", "\\");
export function tokenText(position, ids = tokenIds(), trace = current()) {  // a part of a character as that, marked
  return partsOf(ids, trace).get(position) ?? textOf(ids[position], trace) ?? `#${ids[position]}`;
}
export function tokenName(position, ids = tokenIds(), trace = current()) {
  if (!(position in ids)) return `${position}`;
  const part = partsOf(ids, trace).get(position);
  return part === undefined ? quoted(ids[position], trace) : JSON.stringify(part).replaceAll("\\\\", "\\");
}
const known = new WeakMap();  // of ids: their parts of characters
function partsOf(ids, trace) {
  if (known.get(ids)?.texts !== trace.texts)
    known.set(ids, {texts: trace.texts, parts: partsOfCharacters([...ids].map(id => textOf(id, trace)))});
  return known.get(ids).parts;
}

const watchers = [];
export const watchChoice = watcher => watchers.push(watcher);

// change: some of now's keys. Those who watch get (change, still, how): still() is false as soon as
// something else has been chosen, so that what is on its way for this choice can be thrown away.
let turn = 0;
export function choose(change, how = {}) {
  const mine = ++turn, part = partOf(now.name);
  Object.assign(now, change);
  if ("head" in change) now.wanted = wantedBy(now.head);
  if (!("cell" in change) && part !== partOf(now.name)) now.cell = null;
  if ("head" in change && !("overlay" in change)) now.overlay = [];
  settle();
  if ("cell" in change || "token" in change) settleCell(!("cell" in change));
  if (now.cell && "cell" in change && !("token" in change) && now.name !== LENS) Object.assign(now, cellChoice(...now.cell));
  return Promise.all(watchers.map(watcher => watcher(change, () => mine === turn, how)));
}

// How many query heads belong to one head of a tensor: G for keys and values.
export const sharedBy = name => dimsOf(name).includes("K") ? groupSize() : 1;
export function groupSize() {
  const {H, K} = current().sizes ?? {};
  return H && K ? H / K : 1;
}
function wantedBy(matrix) {  // a key/value head stands for the query head of before, if that is in its group
  const info = now.name === LENS ? null : infoOf(now.name), heads = info ? matricesOf(now.name, info.shape).heads : 1;
  const G = sharedBy(now.name), head = matrix % heads, [, before] = now.wanted;
  return [Math.floor(matrix / heads), heads === 1 && G === 1 ? before : Math.floor(before / G) === head ? before : head * G];
}

function settle() {  // what is chosen must be there
  const info = now.name === LENS ? null : infoOf(now.name);
  if (info) {
    const {n, heads} = matricesOf(now.name, info.shape), [row, head] = now.wanted;
    const own = Math.min(heads - 1, Math.floor(head / sharedBy(now.name)));
    now.head = Math.min(Math.min(row, Math.max(0, n / heads - 1)) * heads + own, n - 1);
    now.overlay = now.overlay.filter(one => one < n);
    if (dimsOf(now.name)) now.row = Math.floor(now.head / heads);
  }
  now.row = Math.min(now.row, current().rows.length - 1);
  now.token = Math.max(0, Math.min(now.token, tokenIds().length - 1));
}

// The position whose numbers a row holds: of norm, some ports keep that of the last position only.
export const skippedRows = name => Math.max(0, tokenIds().length - matricesOf(name, infoOf(name).shape).rows);

function cellsOfName() {  // how many rows and columns of numbers there are to choose from; null: none
  if (now.name !== LENS) return infoOf(now.name)?.count ? matricesOf(now.name, infoOf(now.name).shape) : null;
  const [L, , T] = current().tensors.get("lens.ids")?.shape ?? [];
  return T ? {rows: 2 * L, cols: T} : null;  // each layer, and its attention alone
}
function settleCell(follow) {  // it is there; follow: it moves to the chosen token
  const cells = cellsOfName();
  if (!cells) now.cell = null;
  if (!now.cell) return;
  const {rows, cols} = cells;
  let [row, col] = now.cell;
  if (follow && ["tokens", LENS].includes(now.name)) col = now.token;
  else if (follow && dimsOf(now.name)) row = now.token - skippedRows(now.name);
  now.cell = [Math.max(0, Math.min(row, rows - 1)), Math.min(col, cols - 1)];
}

// The choice of a number of a tensor, and with it of its token. Without a name: of the chosen tensor.
export function cellChoice(row, col, name = now.name) {
  const found = {cell: [row, col]};
  if (isPaired(name, infoOf(name).shape)) found.pair = Math.floor(col / 2);
  if (name === "tokens") found.token = col;
  else if (dimsOf(name)) found.token = row + skippedRows(name);
  return found;
}
export const pickCell = (row, col) => choose(cellChoice(row, col));

export function chooseLayer(layer) {  // the same part there, or the first that there is
  const there = now.names.filter(name => layerOf(name) === layer);
  const name = there.find(other => partOf(other) === partOf(now.name)) ?? there[0];
  if (name) choose({name});
}
