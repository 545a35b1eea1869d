// What a number format can hold: how far a recomputed number may lie from the stored one.

const UNITS = {F64: 2 ** -53, F32: 2 ** -24, F16: 2 ** -11, BF16: 2 ** -8};  // of a number's size, half a step
const LEAST = {F64: 2 ** -1075, F32: 2 ** -150, F16: 2 ** -25, BF16: 2 ** -134};  // half the smallest step
const NAMES = {F64: "float64", F32: "float32", F16: "float16", BF16: "bfloat16"};
const OF_NAMES = Object.fromEntries(Object.entries(NAMES).map(([dtype, name]) => [name, dtype]));

export const formatName = dtype => NAMES[dtype] ?? dtype;
export const unitOf = dtype => UNITS[dtype] ?? 0;
export const formatNamed = name => OF_NAMES[name];
export const roundingOf = (x, dtype) => Math.max(Math.abs(x) * unitOf(dtype), LEAST[dtype] ?? 0);
export function stepAt(x, dtype) {  // the distance to the next number of the format
  if (!(dtype in UNITS) || !Number.isFinite(x)) return 0;
  const power = x === 0 ? -Infinity : Math.floor(Math.log2(Math.abs(x)));
  return Math.max(2 * UNITS[dtype] * 2 ** power, 2 * LEAST[dtype]);
}
