// What a tensor's numbers are like, for each trace apart, and how far two traces differ.

import {read} from "./safetensors.js";
import {inBoth, now, sameShape} from "./state.js";

const STEP = 1 << 20;  // numbers that are read at once

const counts = () => ({low: Infinity, high: -Infinity, nan: 0, inf: 0, sum: 0, square: 0, n: 0});
function count(s, data) {
  for (const x of data) {
    if (Number.isNaN(x)) s.nan++;
    else if (!Number.isFinite(x)) s.inf++;
    else {
      s.n++;
      s.sum += x;
      s.square += x * x;
      if (x < s.low) s.low = x;
      if (x > s.high) s.high = x;
    }
  }
}
function summary({low, high, nan, inf, sum, square, n}) {
  const mean = sum / n;
  return {low, high, nan, inf, n, mean, deviation: Math.sqrt(Math.max(0, square / n - mean * mean))};
}

function addDifference(total, a, b) {
  for (let i = 0; i < a.length; i++) {
    const x = a[i], y = b[i];
    if (Number.isFinite(x)) total.norm += x * x;
    if (x !== y && !(Number.isNaN(x) && Number.isNaN(y))) total.off += (x - y) ** 2;
  }
}
function errorOf({off, norm}) {
  if (off === 0) return 0;
  return Number.isFinite(off) ? Math.sqrt(off / norm) : Infinity;
}

// sides: for each trace low, high, nan, inf, n, mean, deviation, or null if it has no such tensor.
// error, of two traces: the second's distance to the first, relative to the first's size, or why there is none.
export async function statistics(name) {
  const traces = now.traces, both = traces.length > 1 && sameShape(name);
  const there = traces.map(trace => trace.tensors.has(name) ? trace : null);
  const sides = there.map(trace => trace && counts()), total = {off: 0, norm: 0};
  const most = Math.max(...there.map(trace => trace?.tensors.get(name).count ?? 0));
  for (let first = 0; first < most; first += STEP) {
    const found = await Promise.all(there.map(trace =>
      trace && first < trace.tensors.get(name).count ? read(trace, name, first, STEP) : null));
    found.forEach((data, side) => { if (data) count(sides[side], data); });
    if (both) addDifference(total, ...found);
  }
  const error = traces.length < 2 ? null : !inBoth(name) ? "only in one"
    : !both ? "other shape" : errorOf(total);
  return {sides: sides.map(side => side && summary(side)), error};
}
