// Small live pictures of the tensors, for the map. Of large ones only some rows are read.

import {dark, inkOn, rgb} from "./colors.js";
import {$, css, cut, element, percent} from "./dom.js";
import {likeliest} from "./predictions.js";
import {LENS, dimsOf, isAttention, layerOf, matricesOf, partOf} from "./model.js";
import {binned, canvasOf, image} from "./picture.js";
import {read} from "./safetensors.js";
import {current, infoOf, isDifference, isHere, now, textOf, tokenIds, values} from "./state.js";

const WHOLE = 1 << 20, MOST_ROWS = 24, MOST_HIGH = 48, MOST_READS = 512, MOST_CELLS = 128, KEPT = 200;
const kept = new Map();  // what has been read, by side, row of the batch and name
export const forget = () => kept.clear();

async function remembered(key, make) {
  if (!kept.has(key)) {
    if (kept.size > KEPT) kept.clear();
    kept.set(key, make());
  }
  return kept.get(key);
}

function headsOf(name, shape) {  // of one row of the batch: how many matrices, and the first of them
  const {n, perHead} = matricesOf(name, shape), many = /[HK]/.test(dimsOf(name));
  const batch = !many ? n : perHead ? shape[0] : 1, each = n / batch;
  return {each, first: Math.min(now.row, batch - 1) * each};
}

function fewer(rows, most) {  // of so many rows those that are read, the last among them
  if (rows <= most) return Array.from({length: rows}, (_, i) => i);
  return Array.from({length: most}, (_, i) => Math.round(i * (rows - 1) / (most - 1)));
}

async function someRows(name, first, {rows, cols}, most) {  // of the matrix that begins there
  const some = fewer(rows, Math.max(2, most)), data = new Float32Array(some.length * cols);
  const read = await Promise.all(some.map(row => values(name, first + row * cols, cols)));
  read.forEach((row, at) => data.set(row, at * cols));
  return data;
}

function shrunk(data, cols, mostCols) {  // no more than a small picture can show
  const {R, C, pick} = binned(data, data.length / cols, cols, MOST_HIGH, mostCols);
  return {data: Float32Array.from(pick, at => data[at]), rows: R, cols: C};
}

function rangeFor(matrices, name) {  // a few outliers leave the others their colours
  if (partOf(name) === "attention.probs" && !isDifference()) return {signed: false, most: 1};
  const sizes = [], step = Math.ceil(matrices.reduce((sum, {data}) => sum + data.length, 0) / 4096);
  for (const {data} of matrices) for (let i = 0; i < data.length; i += step)
    if (Number.isFinite(data[i])) sizes.push(Math.abs(data[i]));
  sizes.sort((a, b) => a - b);
  return {signed: true, most: sizes[Math.floor(sizes.length * .97)] || sizes.at(-1) || 1};
}

async function matricesFor(name) {
  const {shape} = infoOf(name), layout = matricesOf(name, shape), {each, first} = headsOf(name, shape);
  const n = Math.min(each, MOST_CELLS), {rows, cols, size} = layout, wide = n > 1 ? 64 : 160;
  const all = n * size <= WHOLE && await values(name, first * size, n * size);
  const most = Math.min(MOST_ROWS, Math.floor(MOST_READS / n), Math.floor(WHOLE / n / cols));
  const matrices = [];
  for (let i = 0; i < n; i++) {
    const data = all ? all.subarray(i * size, (i + 1) * size)
      : size * n <= 8 * WHOLE || rows <= most ? await values(name, (first + i) * size, size)
      : await someRows(name, (first + i) * size, layout, most);
    matrices.push(shrunk(data, cols, wide));
  }
  return {matrices, range: rangeFor(matrices, name)};
}

// One rectangle a matrix: [x, y, width, height]. Heads of a group stand one below the other; squares
// are put where they get largest.
export function cellsOf(n, groups, square, wide, high) {
  if (n === 1) return [[0, 0, wide, high]];
  if (square) {
    const sideFor = c => Math.min(wide / c, high / Math.ceil(n / c)), each = n / groups;
    const best = all => all.reduce((a, b) => sideFor(b) > sideFor(a) + .01 ? b : a);
    const any = Array.from({length: n}, (_, i) => i + 1);
    const even = best(any.filter(c => c % each === 0 || each % c === 0));  // so that a group stands together
    const columns = sideFor(even) > .8 * sideFor(best(any)) ? even : best(any);
    const step = sideFor(columns), gap = step > 9 ? 2 : 1, left = (wide - columns * step + gap) / 2;
    const top = Math.max(0, (high - Math.ceil(n / columns) * step) / 2);
    return Array.from({length: n}, (_, i) =>
      [left + i % columns * step, top + Math.floor(i / columns) * step, step - gap, step - gap]);
  }
  const each = Math.ceil(n / groups), lines = Math.ceil(groups / 16), columns = Math.ceil(groups / lines);
  const across = wide / columns, down = high / lines, gap = across > 12 ? 4 : across > 5 ? 2 : 1;
  const tall = (down - (lines > 1 ? 2 : 0)) / each, between = tall > 4 ? 1 : 0;
  return Array.from({length: n}, (_, i) => {
    const group = Math.floor(i / each);
    return [group % columns * across, Math.floor(group / columns) * down + i % each * tall,
            across - gap, tall - between];
  });
}

// How brightly each row of a matrix is drawn: the chosen token's is lit, later ones did not take part.
function lights(rows, token) {
  return row => row === token ? 1 : row > token ? .25 : .75;
}

function cell(pen, [x, y, w, h], {data, rows, cols}, range, light, paper) {
  const dots = devicePixelRatio || 1;
  pen.imageSmoothingEnabled = false;
  const bins = binned(data, rows, cols, Math.max(1, h * dots), Math.max(1, w * dots));
  pen.drawImage(image(data, bins, range), x, y, w, h);
  pen.fillStyle = paper;
  for (let row = 0; row < rows; row++) {
    const shade = 1 - light(row);
    if (shade < .02) continue;
    pen.globalAlpha = shade;
    pen.fillRect(x, y + row * h / rows, w, h / rows + .01);
  }
  pen.globalAlpha = 1;
}

function markRow(pen, [x, y, w, h], row, rows) {  // by a tick at either side
  if (!(row >= 0 && row < rows) || w < 14) return;
  const middle = y + (row + .5) * h / rows, high = Math.max(2, h / rows);
  const top = Math.min(y + h - high, middle - high / 2);
  pen.fillStyle = css("--mark");
  pen.fillRect(x - 1, top, 2.5, high);
  pen.fillRect(x + w - 1.5, top, 2.5, high);
}

// The chosen token's attention in a layer, by head: what it reads from; null where the trace cannot say.
export async function readsOf(layer) {
  const name = `layers.${layer}.attention.probs`;
  if (isDifference() || !current().tensors.has(name)) return null;
  return remembered(`${now.side} ${now.row} ${name} of ${now.token}`, async () => {
    const {shape} = infoOf(name), {rows, cols, size} = matricesOf(name, shape), {each, first} = headsOf(name, shape);
    const at = now.token - Math.max(0, tokenIds().length - rows);
    if (at < 0 || at >= rows) return null;
    return Promise.all(Array.from({length: each}, (_, head) =>
      values(name, (first + head) * size + at * cols, cols)));
  });
}

function chosenHead(heads) {  // of the query heads those that are meant: one, a group, or all
  const info = now.name === LENS ? null : infoOf(now.name), dims = dimsOf(now.name);
  const all = Array.from({length: heads}, (_, i) => i);
  if (!info || layerOf(now.name) === undefined || !/[HK]/.test(dims)) return all;
  const {each} = headsOf(now.name, info.shape), head = now.head % each, group = heads / each;
  return all.filter(i => Math.floor(i / group) === head);
}

function meanOf(reads, heads) {
  return reads[0].map((_, i) => heads.reduce((sum, head) => sum + reads[head][i], 0) / heads.length);
}
export const attendedBy = reads => meanOf(reads, chosenHead(reads.length));

// Keys and values are lit by what the chosen token reads of them, with the heads that share them.
function lightsByReading(reads, n, i) {
  const group = reads.length / n, heads = chosenHead(reads.length).filter(head => Math.floor(head / group) === i);
  if (!heads.length) return () => .12;
  const weights = meanOf(reads, heads), most = Math.max(...weights, 1e-9);
  return (from, to) => .12 + .88 * Math.sqrt(Math.max(0, ...weights.slice(from, to)) / most);
}

async function matrixGlimpse(name, wide, high, groups) {
  const {matrices, range} = await remembered(`${now.side} ${now.row} ${name}`, () => matricesFor(name));
  const n = matrices.length, square = isAttention(name), {shape} = infoOf(name);
  const reading = /^attention\.(k_rotated|v)$/.test(partOf(name)) ? await readsOf(layerOf(name)) : null;
  const cells = cellsOf(n, n % groups ? n : groups, square, wide, high), [canvas, pen] = canvasOf(wide, high);
  const {rows: all} = matricesOf(name, shape), skipped = Math.max(0, tokenIds().length - all);
  const paper = css("--paper");
  const part = row => (row - skipped + .5) / all;  // how far down a token's row stands
  matrices.forEach((matrix, i) => {
    const {rows} = matrix, token = Math.floor(part(now.token) * rows);
    const first = row => Math.floor(row * all / rows);
    const read = reading && lightsByReading(reading, n, i);
    const light = read ? row => read(first(row), Math.max(first(row) + 1, first(row + 1))) : lights(rows, token);
    cell(pen, cells[i], matrix, range, light, paper);
    if (all > 1) markRow(pen, cells[i], token, rows);
  });
  if (n > 1 && name === now.name) {
    const [x, y, w, h] = cells[Math.min(now.head % n, n - 1)];
    pen.strokeStyle = css("--mark");
    pen.lineWidth = 1.5;
    pen.strokeRect(x + .25, y + .25, w - .5, h - .5);
  }
  return canvas;
}

function roomFor(word, n, letters) {  // which positions, around the chosen one, fit into so many letters
  let from = now.token, to = now.token + 1, left = letters - word(now.token).length - 1.2;
  for (const add of [() => from > 0 && [word(from - 1), () => from--], () => to < n && [word(to), () => to++]])
    for (let next; (next = add()) && next[0].length + 1.2 <= left; next[1]()) left -= next[0].length + 1.2;
  return [from, to];
}

// The prompt's tokens, and by bars which of them the chosen one reads.
async function tokensGlimpse(layer, wide, high) {
  const ids = tokenIds(), reads = await readsOf(layer), weights = reads && attendedBy(reads);
  if (!ids.length) return "";
  const word = position => cut((textOf(ids[position]) ?? `#${ids[position]}`).trim() || "␣", 16);
  const [from, to] = roomFor(word, ids.length, Math.floor(high / 17) * Math.floor(wide / 6.4 - 3));
  const line = element("span", {className: "words"});
  for (let position = from; position < to; position++) {
    const one = element("i", {}, word(position));
    one.style.setProperty("--part", `${Math.round(100 * (weights?.[position] ?? 0))}%`);
    if (position === now.token) one.className = "at";
    line.append(one);
  }
  if (from > 0) line.prepend("…");
  if (to < ids.length || goesOn()) line.append("…");
  return line;
}
// Of two prompts those tokens are shown that both begin with; does one of them go on?
const goesOn = () => isDifference() && now.both.lengths.some(length => length > now.both.common);

async function logitsGlimpse(name) {
  const {rows, cols, size} = matricesOf(name, infoOf(name).shape), at = Math.min(now.token, rows - 1);
  const row = Math.min(now.row, infoOf(name).count / size - 1);
  const best = await remembered(`${now.side} ${row} ${name} at ${at}`, async () =>
    likeliest(await values(name, row * size + at * cols, cols), 3));
  const line = element("span", {className: "guesses"});
  for (const [id, p] of best) {
    const one = element("i", {}, element("q", {}, textOf(id) ?? `#${id}`), element("small", {}, `${percent(p, 0)}%`));
    one.style.setProperty("--part", `${percent(p)}%`);
    line.append(one);
  }
  return line;
}

async function lensGlimpse(wide) {  // what each layer would say after the chosen token
  const trace = current(), ids = trace.tensors.get("lens.ids"), probs = trace.tensors.get("lens.probs");
  if (ids?.shape.length !== 4 || `${ids.shape}` !== `${probs?.shape}`) return "";
  const [L, B, T, top] = ids.shape, row = Math.min(now.row, B - 1), at = Math.min(now.token, T - 1);
  const found = await remembered(`${now.side} ${row} lens at ${at}`, () => Promise.all(
    Array.from({length: L}, async (_, layer) => {
      const first = ((layer * B + row) * T + at) * top;
      const [[id], [p]] = await Promise.all([read(trace, "lens.ids", first, 1), read(trace, "lens.probs", first, 1)]);
      return [id, p];
    })));
  const line = element("span", {className: "layers"});
  found.forEach(([id, p], layer) => {
    const one = element("i", {title: `layer ${layer}: ${textOf(id) ?? `#${id}`} ${percent(p, 0)} %`},
      wide / L > 34 ? (textOf(id) ?? `#${id}`).trim() || "␣" : "");
    Object.assign(one.style, {background: rgb(p, {most: 1}), color: inkOn(p, {most: 1})});
    line.append(one);
  });
  return line;
}

export const GLIMPSED = name => [LENS, "tokens"].includes(name) || isHere(name);

// A picture of a tensor, so wide and so high; layer: the one whose attention is shown in the tokens.
export async function glimpseOf(name, {wide, high, groups, layer}) {
  if (name === LENS) return lensGlimpse(wide);
  if (name === "tokens") return tokensGlimpse(layer, wide, high);
  if (!infoOf(name).count) return "";
  if (name === "logits" && !isDifference()) return logitsGlimpse(name);
  return matrixGlimpse(name, wide, high, groups);
}
export const glimpseKey = () =>
  [now.side, now.row, now.token, now.head, now.name, dark.matches, devicePixelRatio].join(" ");
export const unbusy = async () => {  // the large picture comes first
  for (let i = 0; i < 130 && $("picture").ariaBusy === "true"; i++) await new Promise(done => setTimeout(done, 30));
};
