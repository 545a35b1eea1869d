// Reads .safetensors files, and numpy's: the header at once, each tensor's numbers only when they are looked at.

import {arraysOf, kindOf} from "./arrays.js";

const BYTES = {F64: 8, F32: 4, F16: 2, BF16: 2, I64: 8, I32: 4, I16: 2, I8: 1, U8: 1, BOOL: 1};
const ARRAYS = {F64: Float64Array, F32: Float32Array, I32: Int32Array, I16: Int16Array,
                I8: Int8Array, U8: Uint8Array, BOOL: Uint8Array};
export const MASKED = -5e3;  // a score that stands for −∞: e to this is 0 in every number format

const KINDS = "This page opens .safetensors, .npz and .npy.";
const INSTEAD = "only Python reads what torch.save writes; python tools/compare.py FILE.pt --html page.html puts it "
  + "on a page beside the script's";

function failing(name) {
  return why => { throw new Error(`${name} cannot be shown: ${why}. ${KINDS}`); };
}

async function headerOf(blob, fail) {
  if (blob.size < 8) fail(`it has ${blob.size} bytes`);
  const first = new DataView(await blob.slice(0, 8).arrayBuffer());
  const length = Number(first.getBigUint64(0, true));
  if (length > blob.size - 8) fail("its header would end behind the end of the file");
  let header = null;
  try { header = JSON.parse(await blob.slice(8, 8 + length).text()); } catch { fail("its header is no JSON"); }
  return {header: header ?? {}, start: 8 + length};
}

function placeOf(key, info, start, size, fail) {
  const {dtype, shape, data_offsets: at} = info ?? {};
  if (!Array.isArray(shape) || !Array.isArray(at) || !shape.every(n => Number.isInteger(n) && n >= 0))
    fail(`${key} has no shape or no place`);
  const count = shape.reduce((a, b) => a * b, 1);
  if (!(dtype in BYTES)) fail(`${key} holds ${dtype}, which this page does not know`);
  if (at[1] - at[0] !== count * BYTES[dtype] || !(at[0] >= 0)) fail(`${key}: shape and size do not agree`);
  if (start + at[1] > size) fail(`${key} would end behind the end of the file; it is cut off`);
  return {dtype, shape, count, start: start + at[0]};
}

async function heldIn(blob, name, fail) {  // the tensors of a file, and its metadata
  const kind = await kindOf(blob);
  if (kind === "gguf") fail("it holds weights, not the numbers of a pass; --save-trace of the script writes those");
  if (kind === "pickle") fail(INSTEAD);
  if (kind) return {about: {}, tensors: await arraysOf(blob, name, BYTES, fail) ?? fail(INSTEAD)};
  const {header, start} = await headerOf(blob, fail);
  const {__metadata__: about = {}, ...found} = header, tensors = new Map();
  for (const [key, info] of Object.entries(found)) tensors.set(key, placeOf(key, info, start, blob.size, fail));
  return {about, tensors};
}

function jsonOf(text) {
  try { return JSON.parse(text) ?? {}; } catch { return {}; }
}

// A trace: name, blob, tensors (name to dtype, shape, count, start), about (the metadata as strings),
// params and texts (of token ids) out of it, rows (token ids, by row of the batch; arrange() reads them),
// bounds (by name how far another one may be off), found (the tensors as the file names them and lays them out).
export async function openTrace(blob, name) {
  const fail = failing(name), {about, tensors} = await heldIn(blob, name, fail);
  if (!tensors.size) fail("there is no tensor in it");
  return {name, blob, tensors, found: tensors, about, params: jsonOf(about.params), texts: jsonOf(about.texts),
    bounds: jsonOf(about.bounds), rows: [[]]};
}

function half(bits) {
  const sign = bits >> 15 ? -1 : 1, power = bits >> 10 & 31, rest = bits & 1023;
  if (power === 31) return rest ? NaN : sign * Infinity;
  return sign * (power ? (1 + rest / 1024) * 2 ** (power - 15) : rest * 2 ** -24);
}
let halves = null;  // the value of each of the 65,536 float16 numbers

async function stored(trace, {dtype, start, blob = trace.blob}, first, last) {  // numbers as they stand in the file
  const size = BYTES[dtype], bytes = await blob.slice(start + first * size, start + last * size).arrayBuffer();
  if (dtype === "BF16") {
    const held = new Uint16Array(bytes), wide = new Uint32Array(held.length);
    for (let i = 0; i < held.length; i++) wide[i] = held[i] << 16;
    return new Float32Array(wide.buffer);
  }
  if (dtype === "F16") {
    halves ??= Float32Array.from({length: 65536}, (_, bits) => half(bits));
    const held = new Uint16Array(bytes), wide = new Float32Array(held.length);
    for (let i = 0; i < held.length; i++) wide[i] = halves[held[i]];
    return wide;
  }
  if (dtype === "I64") return Float64Array.from(new BigInt64Array(bytes), Number);
  const numbers = new ARRAYS[dtype](bytes);
  return dtype.startsWith("F") ? numbers : Float64Array.from(numbers);
}

function placesOf(axes, first, last) {  // in the file, of numbers first … last of a tensor that is laid out otherwise
  const factors = axes.flat(), at = [], places = new Float64Array(last - first);
  let place = 0, rest = first;
  for (let k = factors.length - 1; k >= 0; k--) {
    at[k] = rest % factors[k][0];
    rest = Math.floor(rest / factors[k][0]);
    place += at[k] * factors[k][1];
  }
  for (let i = 0; i < places.length; i++) {
    places[i] = place;
    for (let k = factors.length - 1; k >= 0; k--) {
      place += factors[k][1];
      if (++at[k] < factors[k][0]) break;
      place -= at[k] * factors[k][1];
      at[k] = 0;
    }
  }
  return places;
}

async function laidOut(trace, info, first, last) {
  const {axes, offset = 0} = info;
  if (!axes) return stored(trace, info, offset + first, offset + last);
  const places = placesOf(axes, first, last);
  let low = Infinity, high = -1;
  for (const place of places) {
    if (place < low) low = place;
    if (place > high) high = place;
  }
  if (high < 0) return new Float32Array(0);
  const held = await stored(trace, info, offset + low, offset + high + 1);
  const data = new held.constructor(places.length);
  for (let i = 0; i < data.length; i++) data[i] = held[places[i] - low];
  return data;
}

// A mask of large negative numbers is a mask: later positions that a score hides are −∞. So are those of scores
// that were kept before their mask.
function masked(data, first, [rows, cols], info) {
  for (let i = 0; i < data.length; i++) {
    if ((!info.before && !(data[i] < MASKED)) || data[i] === -Infinity) continue;
    const at = first + i, col = at % cols, row = Math.floor(at / cols) % rows;
    if (col <= row + cols - rows) continue;
    if (!info.before) info.mask ??= data[i];
    data[i] = -Infinity;
  }
}

// The numbers of a tensor in a typed array: `count` of them from number `first` on. key: its name, or its
// entry in trace.tensors, or one like it.
export async function read(trace, key, first = 0, count = Infinity) {
  const info = typeof key === "string" ? trace.tensors.get(key) : key;
  const data = await laidOut(trace, info, first, first + Math.max(0, Math.min(count, info.count - first)));
  if (info.silu) data.forEach((x, i) => { data[i] = x / (1 + Math.exp(-x)); });
  if (info.scores) masked(data, first, info.shape.slice(-2), info.scores);
  return data;
}
