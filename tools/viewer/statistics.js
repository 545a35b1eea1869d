// What a tensor's numbers are like, for each trace apart, and how far two traces differ, and where.

import {read} from "./safetensors.js";
import {matricesOf} from "./model.js";
import {now} from "./state.js";

const STEP = 1 << 18;  // numbers that are read at once, between two breaths of the page

const counts = () => ({low: Infinity, high: -Infinity, nan: 0, inf: 0, sum: 0, square: 0, n: 0});
function count(s, data) {
  let {low, high, sum, square, n} = s;
  for (let i = 0; i < data.length; i++) {
    const x = data[i];
    if (x - x === 0) {  // it is finite
      n++;
      sum += x;
      square += x * x;
      if (x < low) low = x;
      if (x > high) high = x;
    } else if (x !== x) s.nan++;
    else s.inf++;
  }
  Object.assign(s, {low, high, sum, square, n});
}
function summary({low, high, nan, inf, sum, square, n}) {
  const mean = sum / n;
  return {low, high, nan, inf, n, mean, deviation: Math.sqrt(Math.max(0, square / n - mean * mean))};
}

// off and norm: squares by matrix and row (of heads and positions). most: of all numbers the largest difference.
function nothingApart({shape}, name) {
  const {n, rows, cols} = matricesOf(name, shape);
  return {cols, off: new Float64Array(n * rows), norm: new Float64Array(n * rows), most: 0, at: -1, numbers: []};
}
function addDifference(apart, first, a, b, reference) {
  const {cols} = apart, from = reference ? b : a;
  for (let i = 0; i < a.length;) {  // a row, or what is left of one
    const row = Math.floor((first + i) / cols), end = Math.min(a.length, (row + 1) * cols - first);
    let norm = 0, off = 0;
    for (; i < end; i++) {
      const x = a[i], y = b[i], size = from[i];
      if (size - size === 0) norm += size * size;
      if (x === y || (x !== x && y !== y)) continue;
      const between = Math.abs(x - y), far = between !== between ? Infinity : between;
      off += far * far;
      if (far > apart.most) Object.assign(apart, {most: far, at: first + i, numbers: [x, y]});
    }
    apart.norm[row] += norm;
    apart.off[row] += off;
  }
}
const total = sums => sums.reduce((all, x) => all + x, 0);
export function relative(off, norm) {
  if (off === 0) return 0;
  return Number.isFinite(off) ? Math.sqrt(off / Math.max(norm, 1e-60)) : Infinity;
}

// Ids are the same or not: there is no nearly.
function idsApart() {
  const [a, b] = now.traces.map(({rows}) => rows.flat()), most = Math.max(a.length, b.length);
  const [there, here] = now.traces.map(({rows}) => rows[0] ?? []);
  const places = Array.from({length: most}, (_, i) => i).filter(i => a[i] !== b[i]);
  const first = Array.from({length: Math.max(there.length, here.length)}, (_, i) => i)
    .find(i => there[i] !== here[i]);
  return {count: places.length, of: most, first: first ?? places[0], numbers: [there[first], here[first]]};
}

const pause = () => new Promise(done => setTimeout(done));

// sides: for each trace low, high, nan, inf, n, mean, deviation, or null if it has no such tensor. Of two traces
// also error: their distance relative to the size of the reference, or why there is none; apart: where; ids: of
// tokens instead. told(n): so many more numbers have been read; it gives false where all is to end.
export async function statistics(name, told = () => true) {
  const {traces, both, reference} = now, pair = name === "tokens" ? null : both?.tensors.get(name);
  const infos = traces.map(trace => trace.tensors.get(name)), sides = infos.map(info => info && counts());
  const apart = pair && nothingApart(pair[0], name);
  const whole = infos.every((info, side) => info && pair && pair[side].count === info.count);
  const pieces = whole ? [[pair, true, true]] : [[infos, true, false], ...pair ? [[pair, false, true]] : []];
  for (const [each, counted, compared] of pieces) {
    const most = Math.max(...each.map(info => info?.count ?? 0));
    for (let first = 0; first < most; first += STEP) {
      const found = await Promise.all(each.map((info, side) =>
        info && first < info.count ? read(traces[side], info, first, STEP) : null));
      if (counted) found.forEach((data, side) => { if (data) count(sides[side], data); });
      if (compared) addDifference(apart, first, ...found, reference);
      if (!told(found.reduce((n, data) => n + (data?.length ?? 0), 0))) return null;
      if (first + STEP < most) await pause();
    }
  }
  const ids = name === "tokens" && traces.length > 1 && infos.every(Boolean) ? idsApart() : null;
  const error = traces.length < 2 ? null : ids ? ids.count : apart ? relative(total(apart.off), total(apart.norm))
    : both.why.get(name);
  return {sides: sides.map(side => side ? summary(side) : null), error, apart, ids};
}
