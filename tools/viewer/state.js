// What is opened and chosen. Whatever changes goes through choose(), which tells those who watch.

import {read} from "./safetensors.js";
import {LENS, dimsOf, isPaired, layerCount, layerOf, matricesOf, partOf} from "./model.js";

export const now = {
  traces: [],  // one, or two that are compared
  origin: "file",  // or "page": it came inside this page; or "example": the one that always does
  names: [],  // of all tensors, in the order of the pass
  name: "",  // of the chosen tensor
  head: 0,  // of its matrices the chosen one: head, and row of the batch before it
  wanted: 0,  // the head last chosen, also where a tensor has fewer
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
export const tokenIds = () => current().rows[now.row] ?? current().rows[0];
export const inBoth = name => now.traces.every(trace => trace.tensors.has(name));
export const infoOf = name => current().tensors.get(name)
  ?? now.traces.find(trace => trace.tensors.has(name))?.tensors.get(name);
export function sameShape(name) {
  const shapes = now.traces.map(trace => `${trace.tensors.get(name)?.shape}`);
  return inBoth(name) && shapes.every(shape => shape === shapes[0]);
}
export const isHere = name => isDifference() ? sameShape(name) : current().tensors.has(name);
export const layers = () => layerCount(now.names);

// Numbers of the side that is looked at, or the difference of the two.
export async function values(name, first, count) {
  if (!isDifference()) return read(current(), name, first, count);
  const [a, b] = await Promise.all(now.traces.map(trace => read(trace, name, first, count)));
  return a.map((x, i) => x === b[i] ? 0 : x - b[i]);
}

export const textOf = id => [current(), ...now.traces].map(trace => trace.texts[id])
  .find(text => text !== undefined);
export const quoted = id => textOf(id) === undefined ? `#${id}`
  : JSON.stringify(textOf(id)).replaceAll("\\\\", "\\");
export function tokenName(position) {
  const ids = tokenIds();
  return position in ids ? quoted(ids[position]) : `${position}`;
}

const watchers = [];
export const watchChoice = watcher => watchers.push(watcher);

// change: some of now's keys. Those who watch get (change, still, how): still() is false as soon as
// something else has been chosen, so that what is on its way for this choice can be thrown away.
let turn = 0;
export function choose(change, how = {}) {
  const mine = ++turn, part = partOf(now.name);
  Object.assign(now, change);
  if ("head" in change) now.wanted = now.head;
  if (!("cell" in change) && part !== partOf(now.name)) now.cell = null;
  if ("head" in change && !("overlay" in change)) now.overlay = [];
  settle();
  if ("cell" in change || "token" in change) settleCell(!("cell" in change));
  if (now.cell && "cell" in change && !("token" in change)) Object.assign(now, cellChoice(...now.cell));
  return Promise.all(watchers.map(watcher => watcher(change, () => mine === turn, how)));
}

function settle() {  // what is chosen must be there
  const info = now.name === LENS ? null : infoOf(now.name);
  if (info) {
    const {n, heads} = matricesOf(now.name, info.shape);
    now.head = Math.min(now.wanted, n - 1);
    now.overlay = now.overlay.filter(head => head < n);
    if (dimsOf(now.name)) now.row = Math.floor(now.head / heads);
  }
  now.row = Math.min(now.row, current().rows.length - 1);
  now.token = Math.max(0, Math.min(now.token, tokenIds().length - 1));
}

// The position whose numbers a row holds: of norm, some ports keep that of the last position only.
export const skippedRows = name => Math.max(0, tokenIds().length - matricesOf(name, infoOf(name).shape).rows);

function settleCell(follow) {  // it is there; follow: it moves to the chosen token
  const info = now.name === LENS ? null : infoOf(now.name);
  if (!info?.count) now.cell = null;
  if (!now.cell) return;
  const {rows, cols} = matricesOf(now.name, info.shape);
  let [row, col] = now.cell;
  if (follow && now.name === "tokens") col = now.token;
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
