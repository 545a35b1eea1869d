// Where everything stands in the map: boxes for the tensors, paths between them, what happens on the way.

import {LENS} from "./model.js";

const PAD = 6, HEAD = 13, FOOT = 13, EDGE = 5, BEND = 10;
export const TRUNK = "trunk";  // the residual stream's own column, left of the three others
// Row, first and last column (in thirds of the room beside the trunk).
const START = {tok_embeddings: [0, TRUNK], tokens: [0, 0, 3]};
const LAYER = {
  attention_norm: [1, 0, 1],
  "attention.q": [2, 0, 1], "attention.k": [2, 1, 2], "attention.v": [2, 2, 3],
  "attention.q_rotated": [3, 0, 1], "attention.k_rotated": [3, 1, 2],
  "attention.scores": [4, 0, 1.22], "attention.probs": [4, 1.6, 2.82],
  "attention.heads": [5, 2, 3], "attention.out": [5, 0, 1],
  after_attention: [6, TRUNK], ffn_norm: [6, 0, 1],
  "feed_forward.gate": [7, 1, 2], "feed_forward.up": [7, 2, 3],
  "feed_forward.hidden": [8, 1.6, 2.6], "feed_forward.out": [8, 0, 1],
  out: [9, TRUNK],
};
const END = {[LENS]: [9, 0, 3], norm: [10, 0, 1], logits: [10, 1.45, 3]};
const THUMB = [20, 18, 28, 28, 54, 28, 18, 18, 18, 20, 34];  // how high the pictures of a row are, at least
const STRIP = 1;  // the layers stand above this row

// What happens on the way to a tensor, as it is written at the map's lines, and in words.
export const OPERATORS = {
  tok_embeddings: ["look\nup", "of each token id its row of tok_embeddings.weight"],
  attention_norm: ["norm", "each token's row divided by its root mean square, times a weight"],
  "attention.q": ["× wq per head", "one matrix a head: what does each token ask?"],
  "attention.k": ["× wk per head", "one matrix a key/value head: what does each token offer?"],
  "attention.v": ["× wv per head", "one matrix a key/value head: what does each token give?"],
  "attention.q_rotated": ["rotate", "RoPE: pairs of dims are turned by the position"],
  "attention.k_rotated": ["rotate", "RoPE: pairs of dims are turned by the position"],
  "attention.scores": ["q · k / √E + mask", "how well each key answers each query; later tokens are masked"],
  "attention.probs": ["soft-\nmax", "each row becomes shares that add up to 1"],
  "attention.heads": ["× v", "the values, summed by those shares"],
  "attention.out": ["heads side by side\n× wo", "all heads of a token in one row, times wo"],
  after_attention: ["+", "added to the residual stream"],
  ffn_norm: ["norm", "each token's row divided by its root mean square, times a weight"],
  "feed_forward.gate": ["silu(× w1)", "how much of each unit passes"],
  "feed_forward.up": ["× w3", "what each unit holds"],
  "feed_forward.hidden": ["·", "gate times up, unit by unit"],
  "feed_forward.out": ["× w2", "back to the model's dims"],
  out: ["+", "added to the residual stream"],
  norm: ["norm", "the last norm"],
  logits: ["× output", "the head: a number for each token of the vocabulary"],
  [LENS]: ["as if\nlast", "were this layer the last: its output through the norm and the head"],
};

function rowsOf(high, fixed, thumbs, tight) {  // top and height of each row, so that all fill the room, if they can
  const least = tight ? 15 : 16, gaps = THUMB.length + 1;
  const sum = thumbs.reduce((a, b) => a + b, 0);
  const need = fixed + THUMB.length * (HEAD + FOOT + EDGE);
  const left = high - need - gaps * least, grow = Math.max(.85, Math.min(2, left / sum));
  const gap = least + Math.max(0, Math.min(8, (left - grow * sum) / gaps));
  return {gap, heights: thumbs.map(thumb => HEAD + FOOT + EDGE + Math.round(thumb * grow))};
}

// A layout for a room so wide and so high: boxes by tensor, the two blocks, the strip's top, all in pixels.
export function layoutOf(layer, wide, high, stripHigh) {
  const tight = wide < 420, trunk = Math.round(wide * (tight ? .21 : .185)), lane = tight ? 36 : 42;
  const left = PAD + trunk + lane, gutter = tight ? 6 : 11, third = (wide - PAD - left + gutter) / 3;
  const {gap, heights} = rowsOf(high, stripHigh + 8, THUMB, tight);
  const tops = [];
  let y = 4;
  heights.forEach((height, row) => {
    if (row === STRIP) y += stripHigh + 6;
    tops.push(y);
    y += height + gap;
  });
  const boxes = new Map();
  const place = (part, name, [row, from, to]) => boxes.set(name, {
    part, row, y: tops[row], h: heights[row], trunk: from === TRUNK,
    x: from === TRUNK ? PAD : left + from * third, w: from === TRUNK ? trunk : (to - from) * third - gutter});
  for (const [part, at] of Object.entries(START)) place(part, part, at);
  for (const [part, at] of Object.entries(LAYER)) place(part, `layers.${layer}.${part}`, at);
  for (const [part, at] of Object.entries(END)) place(part, part, at);
  const block = (from, to) => ({x: left - 7, w: wide - PAD - left + 12, y: tops[from] - gap / 2 + 1,
    h: tops[to] + heights[to] - tops[from] + gap - 2});
  const note = row => ({x: left + third, y: tops[row], w: wide - PAD - left - third, h: heights[row]});
  return {boxes, gap, left, tight, high: y - gap + 6, axis: PAD + trunk / 2, joint: tops[STRIP] - gap / 2,
          stripTop: tops[STRIP] - stripHigh - gap / 2 - 3,
          blocks: [block(1, 5), block(6, 8)], notes: [note(1), note(6)]};
}

const middle = ({x, w}) => x + w / 2, centre = ({y, h}) => y + h / 2;

const HEADS = {right: "m-4 -3 l4 3 l-4 3", left: "m4 -3 l-4 3 l4 3", down: "m-3 -4 l3 4 l3 -4"};

// The line from one box to another: path; stream: the part of it that is the
// residual stream from above the block; at: where its operator stands; kind.
export function lineOf(from, to, {axis, gap, left, joint}) {
  const above = from.row < 1, start = above ? joint : from.y + from.h;
  const stream = above && from.trunk ? `M${axis} ${from.y + from.h} V${joint}` : undefined;
  if (to.trunk && from.trunk) return {path: `M${axis} ${start} V${to.y}`, kind: TRUNK, stream};
  if (to.trunk && from.row < to.row) {  // a block comes back to the stream, where it is added
    const y = centre(from);
    return {path: `M${from.x} ${y} H${axis + 9} ${HEADS.left}`, at: [axis, y]};
  }
  if (from.row === to.row) {
    const y = centre(from), right = from.x < to.x;
    const [a, b] = right ? [from.x + from.w, to.x] : [from.x, to.x + to.w];
    return {path: `M${a} ${y} H${b} ${right ? HEADS.right : HEADS.left}`, at: [(a + b) / 2, y]};
  }
  if (from.trunk) {  // out of the stream into a block
    const y = centre(to);
    return {stream, path: `M${axis} ${start} V${y - BEND} q0 ${BEND} ${BEND} ${BEND} H${to.x} ${HEADS.right}`,
            at: [left - (left - axis) * .38, y]};
  }
  if (to.row - from.row > 1) {  // straight down at the right, past what stands between
    const x = from.x + from.w - 9;
    return {path: `M${x} ${from.y + from.h} V${to.y} ${HEADS.down}`};
  }
  const [a, b] = [Math.max(middle(from), to.x + 12), middle(to)], y = from.y + from.h;
  const begin = Math.min(a, from.x + from.w - 12);
  const end = to.part === "attention.heads" ? Math.max(begin, to.x + 14) : b;
  return {path: `M${begin} ${y} C${begin} ${y + gap * .8} ${end} ${to.y - gap * .8} ${end} ${to.y} ${HEADS.down}`,
          at: [end, to.y - gap / 2]};
}
