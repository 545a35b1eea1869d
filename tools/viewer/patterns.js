// Each head of a layer: a small picture of where its tokens look, and in numbers what that is like.

import {paletteOf} from "./colors.js";
import {element} from "./dom.js";
import {matricesOf} from "./model.js";
import {infoOf, now, tokenIds, values} from "./state.js";

const PIXELS = 64, STEP = 1 << 20;  // numbers that are read at once

// What heads are sorted by: words, what is said of it, and the least first (-1: the most).
export const KINDS = {
  entropy: ["entropy", "bits, mean of the tokens: 0 looks at one token, high at many alike", 1],
  previous: ["previous token", "weight on the token just before, mean of the tokens", -1],
  first: ["first token", "weight on the very first token, mean of the tokens", -1],
  self: ["itself", "weight on the token itself, mean of the tokens", -1],
  same: ["earlier same token", "weight on earlier tokens that are the same, mean of those that have one", -1],
  after: ["after an earlier same token", "weight on what came after earlier same tokens, mean of those that "
    + "have one: an induction head goes on as it went on before", -1],
};
export const CHANGED = ["difference", "the largest difference between the two traces", -1];

function earlierOf(ids) {  // of each position the earlier ones with the same token
  const seen = new Map();
  return [...ids].map((id, i) => {
    const there = seen.get(id) ?? [];
    seen.set(id, [...there, i]);
    return there;
  });
}

function repeated(data, at, S, earlier, T) {
  let same = 0, after = 0, n = 0;
  for (let i = 0; i < T && i < earlier.length; i++) {
    if (!earlier[i].length) continue;
    n++;
    for (const j of earlier[i]) {
      same += data[at + i * S + j];
      if (j + 1 < i) after += data[at + i * S + j + 1];
    }
  }
  return {same: same / n, after: after / n};  // NaN, if no token comes twice
}

// Logarithms of millions of weights: the exponent of a float32, and a table of the first 11 bits behind it.
const LOG = Float32Array.from({length: 2048}, (_, i) => Math.log2(1 + (i + .5) / 2048));
const inBits = bits => (bits >>> 23) - 127 + LOG[bits >>> 12 & 2047];

// T × S numbers from `at` on. pixels: of each group of cells the number farthest from zero.
function summary(data, at, T, S, earlier) {
  const R = Math.min(T, PIXELS), C = Math.min(S, PIXELS), pixels = new Float32Array(R * C).fill(-Infinity);
  const bin = Uint16Array.from({length: S}, (_, j) => j * C / S), bits = new Uint32Array(data.buffer);
  let entropy = 0, most = 0, previous = 0, first = 0, self = 0;
  for (let i = 0; i < T; i++) {
    const row = at + i * S, to = Math.floor(i * R / T) * C;
    let end = S;  // what is masked: behind it there are only zeros
    while (end > 0 && data[row + end - 1] === 0) end--;
    for (let k = end < S ? bin[end] : C; k < C; k++) if (pixels[to + k] === -Infinity) pixels[to + k] = 0;
    for (let j = 0; j < end; j++) {
      const x = data[row + j], k = to + bin[j];
      if (x === -Infinity) continue;
      const size = x < 0 ? -x : x, there = pixels[k];
      if (x > 0) entropy -= x * inBits(bits[row + j]);
      if (size > most) most = size;
      if (there === -Infinity || !(size <= (there < 0 ? -there : there))) pixels[k] = x;
    }
    if (i > 0) {
      previous += data[row + i - 1];
      first += data[row];
      self += data[row + i];
    }
  }
  const n = Math.max(1, T - 1);  // the first token can look at itself alone
  return {R, C, pixels, most, entropy: entropy / n, previous: previous / n, first: first / n,
          self: self / n, difference: most, ...repeated(data, at, S, earlier, T)};
}

const inFloats = data => data instanceof Float32Array ? data : Float32Array.from(data);
let known = {traces: null, found: new Map()};
// Of each head of a tensor B H T S, in the row of the batch that is looked at: as summary() gives it.
export async function patternsOf(name, still) {
  if (known.traces !== now.traces) known = {traces: now.traces, found: new Map()};
  const key = `${name} ${now.side} ${now.row}`, {found} = known;
  if (found.has(key)) return found.get(key);
  const {rows, cols, size, n, heads, perHead} = matricesOf(name, infoOf(name).shape);
  const many = perHead ? heads : n, from = perHead ? now.row * heads : 0;
  const earlier = earlierOf(tokenIds()), each = Math.max(1, Math.floor(STEP / size)), all = [];
  const at = head => head < many ? values(name, (from + head) * size, Math.min(each, many - head) * size) : null;
  let coming = at(0);
  for (let head = 0; head < many; head += each) {
    const data = inFloats(await coming), count = Math.min(each, many - head);
    if (!still()) return null;
    coming = at(head + each);  // is read while these are looked at
    for (let i = 0; i < count; i++) all.push(summary(data, i * size, rows, cols, earlier));
  }
  found.set(key, all);
  return all;
}

export function patternCanvas({R, C, pixels, most}, signed, size) {
  const toColour = paletteOf({signed, most: most || 1}), canvas = element("canvas", {width: C, height: R});
  const pen = canvas.getContext("2d", {alpha: false}), image = new ImageData(C, R);
  const bytes = new Uint32Array(image.data.buffer);
  for (let i = 0; i < pixels.length; i++) bytes[i] = toColour(pixels[i]);
  pen.putImageData(image, 0, 0);
  Object.assign(canvas.style, {width: `${size}px`, height: `${size}px`});
  return canvas;
}

// Many of them in one canvas: a canvas each would take longer than to read them. places: [pattern, x, y].
export function patternsCanvas(places, signed, size, width, height) {
  const scale = Math.min(2, Math.max(1, Math.round(devicePixelRatio))), side = size * scale;
  const canvas = element("canvas", {width: width * scale, height: height * scale}), pen = canvas.getContext("2d");
  const image = new ImageData(side, side), bytes = new Uint32Array(image.data.buffer), most = new Float32Array(side * side);
  for (const [found, x, y] of places) {
    const toColour = paletteOf({signed, most: found.most || 1}), {R, C, pixels} = found;
    const [up, across] = [Math.max(1, R / side), Math.max(1, C / side)];
    for (let v = 0; v < side; v++) for (let u = 0; u < side; u++) {  // the farthest from zero of those that fall here
      const i = Math.floor(v * R / side), j = Math.floor(u * C / side);
      let best = pixels[i * C + j];
      for (let k = i; k < Math.min(R, i + up); k++) for (let l = j; l < Math.min(C, j + across); l++) {
        const at = pixels[k * C + l];
        if (best === -Infinity || Math.abs(at) > Math.abs(best)) best = at === -Infinity ? best : at;
      }
      most[v * side + u] = best;
    }
    for (let i = 0; i < most.length; i++) bytes[i] = toColour(most[i]);
    pen.putImageData(image, Math.round(x * scale), Math.round(y * scale));
  }
  Object.assign(canvas.style, {width: `${width}px`, height: `${height}px`});
  return canvas;
}
