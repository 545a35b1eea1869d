// Reads .safetensors files: the header at once, each tensor's numbers only when they are looked at.

const BYTES = {F64: 8, F32: 4, F16: 2, BF16: 2, I64: 8, I32: 4, I16: 2, I8: 1, U8: 1, BOOL: 1};
const ARRAYS = {F64: Float64Array, F32: Float32Array, I32: Int32Array, I16: Int16Array,
                I8: Int8Array, U8: Uint8Array, BOOL: Uint8Array};
const MOST_ROWS = 1000;  // of a batch

function failing(name) {
  return why => { throw new Error(`${name} is not a safetensors file that can be shown: ${why}.`); };
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

function jsonOf(text) {
  try { return JSON.parse(text) ?? {}; } catch { return {}; }
}

async function tokenRows(trace) {  // the token ids of each row of the batch
  const {shape = []} = trace.tensors.get("tokens") ?? {}, T = shape.at(-1);
  if (!T) return [[]];
  const rows = Array.from({length: Math.min(shape.at(-2) ?? 1, MOST_ROWS)}, (_, row) => row);
  return Promise.all(rows.map(async row => [...await read(trace, "tokens", row * T, T)]));
}

// A trace: name, blob, tensors (name to dtype, shape, count, start), about (the metadata as strings),
// params and texts (of token ids) out of it, rows (token ids, by row of the batch).
export async function openTrace(blob, name) {
  const fail = failing(name), {header, start} = await headerOf(blob, fail);
  const {__metadata__: about = {}, ...found} = header, tensors = new Map();
  for (const [key, info] of Object.entries(found)) tensors.set(key, placeOf(key, info, start, blob.size, fail));
  if (!tensors.size) fail("there is no tensor in it");
  const trace = {name, blob, tensors, about, params: jsonOf(about.params), texts: jsonOf(about.texts)};
  trace.rows = await tokenRows(trace);
  return trace;
}

function half(bits) {
  const sign = bits >> 15 ? -1 : 1, power = bits >> 10 & 31, rest = bits & 1023;
  if (power === 31) return rest ? NaN : sign * Infinity;
  return sign * (power ? (1 + rest / 1024) * 2 ** (power - 15) : rest * 2 ** -24);
}
let halves = null;  // the value of each of the 65,536 float16 numbers

// The numbers of a tensor in a typed array: `count` of them from number `first` on.
export async function read(trace, key, first = 0, count = Infinity) {
  const {dtype, start, count: all} = trace.tensors.get(key), size = BYTES[dtype];
  const last = first + Math.min(count, all - first);
  const bytes = await trace.blob.slice(start + first * size, start + last * size).arrayBuffer();
  if (dtype === "BF16") {
    return new Float32Array(Uint32Array.from(new Uint16Array(bytes), bits => bits << 16).buffer);
  }
  if (dtype === "F16") {
    halves ??= Float32Array.from({length: 65536}, (_, bits) => half(bits));
    return Float32Array.from(new Uint16Array(bytes), bits => halves[bits]);
  }
  if (dtype === "I64") return Float64Array.from(new BigInt64Array(bytes), Number);
  const numbers = new ARRAYS[dtype](bytes);
  return dtype.startsWith("F") ? numbers : Float64Array.from(numbers);
}
