// How the chosen number came about: its operands out of the trace, recomputed, beside the stored number.

import {rgb} from "./colors.js";
import {element, link, show} from "./dom.js";
import {headsOf, matrixIn, weightOf} from "./meaning.js";
import {LENS, columnName, dimsOf, inputsOf, layerOf, matricesOf, partOf} from "./model.js";
import {formatName, formatNamed, roundingOf, stepAt, unitOf} from "./rounding.js";
import {read} from "./safetensors.js";
import {cellChoice, choose, current, isDifference, now, quoted, skippedRows, tokenIds, tokenName} from "./state.js";

const MOST_TERMS = 128, SHOWN_TERMS = 40, MOST_OTHERS = 48, FLOAT = unitOf("F32");
const exactly = x => (Number.isFinite(x) && !Number.isInteger(x) ? `${+x.toPrecision(7)}` : show(x)).replace("-", "−");
const sumOf = numbers => numbers.reduce((sum, x) => sum + x, 0);

// ---------------------------------------------------------------------------------------- operands

class Missing extends Error {}  // an operand that the trace does not hold

function tensorOf(name) {
  const info = current().tensors.get(name);
  if (!info) throw new Missing(`This trace holds no ${name}, which it is made of.`);
  return {info, ...matricesOf(name, info.shape)};
}
async function rowOf(name, matrix, row, wanted) {  // one row of numbers; wanted: how many there must be
  const {info, rows, cols, size, n} = tensorOf(name);
  if (matrix >= n || row < 0 || row >= rows || (wanted !== undefined && cols !== wanted))
    throw new Missing(`${name} of this trace (${info.shape.join(" × ")}) has no such row: is it laid out otherwise?`);
  return read(current(), name, matrix * size + row * cols, cols);
}
const dtypeOf = name => tensorOf(name).info.dtype;
// Of a tensor and of the numbers while the pass ran: the coarser of the two.
const unitIn = name => Math.max(unitOf(dtypeOf(name)), unitOf(formatNamed(current().about.dtype)));

function goTo(name, matrix, row, col) {
  const several = matricesOf(name, tensorOf(name).info.shape).n > 1;
  return () => choose({name, ...(several ? {head: matrix} : {}), ...cellChoice(row, col, name)});
}
function operand(x, name, matrix, row, col) {
  return link(show(x), goTo(name, matrix, row, col), {title: `${name}, row ${row}, ${columnName(name)} ${col}`});
}

// A row of a weight, if this trace holds it: whole, or of the head the rows of the likeliest tokens.
async function weightRow(name, row) {
  const trace = current();
  if (trace.tensors.has(name)) return {row: await rowOf(name, 0, row), dtype: dtypeOf(name)};
  if (name !== "output.weight" || !trace.tensors.has("lens.head_ids")) return null;
  const at = (await read(trace, "lens.head_ids")).indexOf(row);
  return at < 0 ? null : {row: await rowOf("lens.head_rows", 0, at), dtype: dtypeOf("lens.head_rows")};
}

// ---------------------------------------------------------------------------------------- how each is made
// Each gives {words, steps: [what, number or element], terms: [label, its factors as elements, product],
// result, slack: how far rounding before the last step may take it}; without a result it cannot be recomputed.

const times = (a, b) => element("span", {}, a, " × ", b);

function dot(a, b, unit) {  // of two rows; unit: what their numbers may be off by, of their size
  const products = Array.from(a, (x, n) => x * b[n]);
  return {products, result: sumOf(products),
    slack: sumOf(products.map(Math.abs)) * (unit + a.length * FLOAT)};
}

function groupWords(name, kind, matrix) {
  const H = headsOf(name, tensorOf(name).info.shape), K = headsOf(kind, tensorOf(kind).info.shape);
  const head = matrix % H, G = H / K, j = Math.floor(head / G);
  return G > 1 ? ` Query head ${head} uses key/value head ${j}, as heads ${j * G} to ${j * G + G - 1} do (G = ${G}).` : "";
}

async function score({name, matrix, row, col}) {
  const [qs, ks] = inNames(name, "attention.q_rotated", "attention.k_rotated");
  const q = await rowOf(qs, matrix, row), kMatrix = inMatrix(ks, name, matrix);
  const k = await rowOf(ks, kMatrix, col, q.length), root = Math.sqrt(q.length);
  const {products, result, slack} = dot(q, k, unitIn(qs) + unitIn(ks));
  const {rows, cols} = tensorOf(name), masked = col > row + cols - rows;
  const terms = products.map((x, n) => [`dim ${n}`,
    times(operand(q[n], qs, matrix, row, n), operand(k[n], ks, kMatrix, col, n)), x]);
  const words = `The query of ${tokenName(row)} meets the key of ${tokenName(col)}: Σ q·k / √E, with E = ${q.length}.`
    + groupWords(name, ks, matrix);
  if (masked) return {words: `${words} ${tokenName(col)} comes later, so the mask puts −∞ here; without it the `
    + `score would be ${show(result / root)}.`, terms, result: -Infinity};
  return {words, terms, steps: [["Σ q·k", show(result)], ["√E", show(root)], ["Σ / √E", exactly(result / root)]],
    result: result / root, slack: slack / root + 2 * unitIn(name) * Math.abs(result / root)};
}

async function probability({name, matrix, row, col}) {
  const [from] = inNames(name, "attention.scores"), scores = await rowOf(from, matrix, row, tensorOf(name).cols);
  const most = scores.reduce((a, b) => Math.max(a, b), -Infinity), unit = unitIn(from);
  const powers = Array.from(scores, x => Math.exp(x - most)), sum = sumOf(powers), result = powers[col] / sum;
  const off = x => Number.isFinite(x) ? Math.abs(x) * unit : 0;
  const slack = result * (off(scores[col]) + sumOf(powers.map((x, n) => x * off(scores[n]))) / sum + 4 * FLOAT);
  const seen = powers.map((x, n) => n).filter(n => powers[n] > 0 || n === col);
  const terms = seen.map(n => [tokenName(n),
    element("span", {}, "e^(", operand(scores[n], from, matrix, row, n), ` − ${show(most)}) / Σ`), powers[n] / sum,
    n === col]);
  return {words: `e^score / Σ: of all that ${tokenName(row)} looks at, the share of ${tokenName(col)}. `
    + "Bars: each token's share.", terms, total: false,
    steps: [[`e^(${show(scores[col])} − ${show(most)})`, show(powers[col])],
      [`Σ e^(score − ${show(most)})`, show(sum)], ["their quotient, the share", exactly(result)]],
    note: `${show(most)} is the row's largest score; taken off everywhere, it changes nothing but keeps e^ small.`,
    result, slack};
}

async function headValue({name, matrix, row, col}) {
  const [ps, vs] = inNames(name, "attention.probs", "attention.v"), p = await rowOf(ps, matrix, row);
  const vMatrix = inMatrix(vs, name, matrix), {rows, cols, size} = tensorOf(vs);
  if (rows !== p.length) throw new Missing(`${vs} of this trace has ${rows} rows for ${p.length} positions.`);
  const all = await read(current(), vs, vMatrix * size, size), v = Array.from(p, (_, s) => all[s * cols + col]);
  const {products, result, slack} = dot(p, v, unitIn(ps) + unitIn(vs));
  const least = sumOf(v.map((x, s) => p[s] ? Math.abs(x) * roundingOf(0, dtypeOf(ps)) : 0));
  const seen = products.map((x, s) => s).filter(s => p[s] > 0);
  return {words: `Σ p·v: what ${tokenName(row)} reads of dim ${col}, from each token as much as its attention says.`
    + groupWords(name, vs, matrix), result, slack: slack + least,
    terms: seen.map(s => [tokenName(s),
      times(operand(p[s], ps, matrix, row, s), operand(v[s], vs, vMatrix, s, col)), products[s]])};
}

async function normed({name, matrix, row, col}) {
  const [from] = inputsOf(name, now.names), eps = current().params.norm_eps;
  if (!from) throw new Missing("This trace does not hold the residual stream it is made of.");
  if (!(eps >= 0)) throw new Missing("norm_eps is not in this trace's metadata (params).");
  const {rows, cols} = tensorOf(name), skip = tensorOf(from).rows - rows;
  const at = async n => {  // a row's x, its rms, and what x / rms is in this column
    const xs = await rowOf(from, matrix, n + skip, cols), rms = Math.sqrt(sumOf(Array.from(xs, x => x * x)) / cols + eps);
    return {n, x: xs[col], rms, share: xs[col] / rms};
  };
  const here = await at(row), unit = unitIn(from), weight = weightOf(name), known = await weightRow(weight, 0);
  const steps = [["x", operand(here.x, from, matrix, row + skip, col)],
    [`rms = √(Σ x² / ${cols} + ${eps})`, show(here.rms)], ["x / rms", show(here.share)]];
  const off = 4 * unit + 8 * FLOAT;
  const words = "The stream's number, divided by the size of its token's vector (the root mean square, rms), times a "
    + "weight that training gave this dim.";
  if (known) {
    const result = here.share * known.row[col];
    return {words, steps: [...steps, [`weight, ${weight}, number ${col}`, show(known.row[col])]],
      result, slack: Math.abs(result) * (off + unitOf(known.dtype))};
  }
  const every = Math.ceil(rows / MOST_OTHERS), others = [];
  for (let n = 0; n < rows; n += every) if (n !== row) others.push(at(n));
  const best = (await Promise.all(others)).filter(({share}) => Number.isFinite(share) && share !== 0)
    .reduce((a, b) => Math.abs(b.share) > Math.abs(a?.share ?? 0) ? b : a, null);
  if (!best) return {words, steps, note: `The weight, ${weight}, is not in the trace, and no other `
    + "position tells what it is."};
  const made = (await rowOf(name, matrix, best.n))[col], w = made / best.share, result = here.share * w;
  return {words, result,
    note: `The weight, ${weight}, is not in the trace. But it is the same at every position, so another one tells `
      + `it: at ${tokenName(best.n + skip)} the number is ${show(made)} and x / rms ${show(best.share)}.`,
    steps: [...steps, [`weight: ${show(made)} / ${show(best.share)}`, operand(w, name, matrix, best.n, col)]],
    slack: Math.abs(result) * (2 * off + (made ? roundingOf(made, dtypeOf(name)) / Math.abs(made) : 0))
      + (made ? 0 : roundingOf(0, dtypeOf(name)))};
}

export function turnOf(pair, size, position, params) {  // the angle, in float32 as the script has it
  const {rope_theta: theta, use_scaled_rope: scaled, rope_scaling_factor: factor, rope_low_freq_factor: low,
    rope_high_freq_factor: high, rope_original_context: context} = params, float = Math.fround;
  let frequency = float(1 / float(theta ** float(2 * pair / size)));
  if (scaled) {
    const turns = context * frequency / (2 * Math.PI), keep = Math.max(0, Math.min(1, (turns - low) / (high - low)));
    frequency = float((1 - keep) * frequency / factor + keep * frequency);
  }
  return float(position * frequency);
}

function degreesOf(angle) {
  const degrees = angle * 180 / Math.PI, turns = Math.floor(degrees / 360);
  return turns ? `${turns} turn${turns > 1 ? "s" : ""} and ${show(degrees - 360 * turns)}°` : `${show(degrees)}°`;
}

async function turned({name, matrix, row, col}) {
  const [from] = inputsOf(name, now.names), {params} = current(), pair = Math.floor(col / 2);
  if (!from) throw new Missing("This trace does not hold what was turned.");
  const x = await rowOf(from, matrix, row, tensorOf(name).cols), [a, b] = [x[2 * pair], x[2 * pair + 1]];
  const second = col % 2 === 1, link0 = operand(a, from, matrix, row, 2 * pair);
  const link1 = operand(b, from, matrix, row, 2 * pair + 1);
  const words = `Dims ${2 * pair} and ${2 * pair + 1} are a pair, a point (a, b) that turns with its position, `
    + `here ${row}. This is its ${second ? "second number, a·sin + b·cos" : "first number, a·cos − b·sin"}.`;
  const steps = [["a", link0], ["b", link1]];
  if (!(params.rope_theta > 0) || (params.use_scaled_rope && !(params.rope_scaling_factor > 0)))
    return {words, steps, note: "The angle is not known: rope_theta is not in this trace's metadata (params)."};
  const angle = turnOf(pair, x.length, row, params), cos = Math.cos(angle), sin = Math.sin(angle);
  const result = second ? a * sin + b * cos : a * cos - b * sin, size = Math.abs(a) + Math.abs(b);
  return {words, result, slack: size * (unitIn(from) + (2 + 4 * angle) * FLOAT),
    steps: [...steps, ["angle", `${show(angle)} rad, ${degreesOf(angle)}`],
      ["cos, sin", `${show(cos)}, ${show(sin)}`]]};
}

async function product({name, matrix, row, col}) {
  const [gates, ups] = inNames(name, "feed_forward.gate", "feed_forward.up");
  const gate = (await rowOf(gates, matrix, row))[col], up = (await rowOf(ups, matrix, row))[col], result = gate * up;
  return {words: "gate × up.", steps: [["gate", operand(gate, gates, matrix, row, col)],
    ["up", operand(up, ups, matrix, row, col)]], result, slack: Math.abs(result) * (unitIn(gates) + unitIn(ups))
      + roundingOf(0, dtypeOf(gates)) * Math.abs(up) + roundingOf(0, dtypeOf(ups)) * Math.abs(gate)};
}

async function plus({name, matrix, row, col}) {
  const from = inputsOf(name, now.names), numbers = [];
  if (from.length < 2) throw new Missing("This trace does not hold both: the stream before, and what was added.");
  for (const other of from) numbers.push((await rowOf(other, matrix, row))[col]);
  return {words: "before + what was added. Nothing is replaced: that is why it is a residual stream.",
    steps: from.map((other, n) => [other, operand(numbers[n], other, matrix, row, col)]), result: sumOf(numbers),
    slack: sumOf(numbers.map((x, n) => Math.abs(x) * unitIn(from[n])))};
}

// A row of a weight times the input: the trace holds the input, rarely the weight.
async function projected({name, matrix, row, col}) {
  const part = partOf(name), weight = weightOf(name), {cols} = tensorOf(name);
  const [from] = inputsOf(name, now.names), shown = name === "logits" ? quoted(col) : "";
  if (!from) throw new Missing("This trace does not hold what it is made of.");
  const heads = headsOf(name, tensorOf(name).info.shape), isOut = part === "attention.out";
  const number = /^attention\.[qkv]$/.test(part) ? matrix % heads * cols + col : col;
  const {rows, n} = tensorOf(from), skip = rows - tensorOf(name).rows;
  const inner = isOut ? headsOf(from, tensorOf(from).info.shape) : 1, first = Math.floor(matrix / heads) * inner;
  if (first + inner > n) throw new Missing(`${from} of this trace is laid out otherwise.`);
  const pieces = [];
  for (let h = 0; h < inner; h++) pieces.push([...await rowOf(from, first + h, row + skip)]);
  const x = pieces.flat(), each = pieces[0].length, found = await weightRow(weight, number);
  const opened = link(from, goTo(from, first, row + skip, 0));
  const words = [`Row ${number}${shown && ` (${shown})`} of `, element("code", {}, weight), ` times the ${x.length} numbers of `,
    opened, isOut ? `, of all ${inner} heads side by side.` : "."];
  const silu = part === "feed_forward.gate";
  if (silu) words.push(" What comes out, z, goes through silu: z / (1 + e^−z).");
  if (!found) return {words, note: `That row is ${x.length} numbers that this trace does not hold`
    + (name === "logits" ? "; --save-trace keeps those of the likeliest tokens." : ": weights are not in a trace.")};
  if (found.row.length !== x.length) throw new Missing(`${weight} of this trace has rows of ${found.row.length} numbers.`);
  const {products, result: z, slack} = dot(x, found.row, unitIn(from) + unitOf(found.dtype));
  const result = silu ? z / (1 + Math.exp(-z)) : z;
  const terms = products.map((product, n) => [`${isOut ? `head ${Math.floor(n / each)}, ` : ""}${columnName(from)} ${n % each}`,
    times(operand(x[n], from, first + Math.floor(n / each), row + skip, n % each), show(found.row[n])), product]);
  return {words, terms, result, steps: silu ? [["z", show(z)], ["z / (1 + e^−z)", exactly(result)]] : [],
    slack: 1.1 * slack + 2 * unitIn(from) * Math.abs(z)};
}

async function embedding({name, matrix, row, col}) {
  const id = tokenIds()[row], weight = weightOf(name);
  const words = [`Number ${col} of row ${id} of `, element("code", {}, weight), `: the vector of ${quoted(id)}, wherever it stands.`];
  const found = id === undefined ? null : await weightRow(weight, id);
  if (!found) return {words, note: "Weights are not in a trace."};
  return {words, result: found.row[col], slack: roundingOf(found.row[col], found.dtype)};
}

async function id({col}) {
  const found = tokenIds()[col];
  return {words: `The tokenizer cut the prompt into pieces; the piece at position ${col} is ${quoted(found)}, number ${found} `
    + "of its vocabulary."};
}

const HOW = {
  tokens: id, tok_embeddings: embedding, attention_norm: normed, ffn_norm: normed, norm: normed,
  "attention.q": projected, "attention.k": projected, "attention.v": projected, "attention.out": projected,
  "attention.q_rotated": turned, "attention.k_rotated": turned, "attention.scores": score,
  "attention.probs": probability, "attention.heads": headValue, after_attention: plus, out: plus,
  "feed_forward.gate": projected, "feed_forward.up": projected, "feed_forward.out": projected,
  "feed_forward.hidden": product, logits: projected,
};
const inNames = (name, ...parts) => parts.map(part => `layers.${layerOf(name)}.${part}`);
function inMatrix(other, name, matrix) {
  tensorOf(other);
  return matrixIn(other, name, matrix);
}

// ---------------------------------------------------------------------------------------- on the page

function table(terms, total) {
  const large = terms.length > MOST_TERMS, most = Math.max(...terms.map(([, , x]) => Math.abs(x)), 1e-30);
  const kept = large ? [...terms].sort((a, b) => Math.abs(b[2]) - Math.abs(a[2])).slice(0, SHOWN_TERMS) : terms;
  const made = element("table"), line = (...cells) => element("tr", {}, ...cells.map(cell => element("td", {}, cell)));
  for (const [label, factors, x, chosen] of kept) {
    const bar = element("div");
    Object.assign(bar.style, {width: `calc(var(--bar) * ${Math.abs(x) / most})`, height: "11px",
      background: rgb(x < 0 ? -1 : 1, {signed: true, most: 1})});
    const row = line(label, factors, `= ${show(x)}`, bar);
    if (chosen) row.setAttribute("aria-selected", true);
    made.append(row);
  }
  const rest = sumOf(terms.map(([, , x]) => x)) - sumOf(kept.map(([, , x]) => x));
  if (large && total !== false) made.append(line(`the other ${terms.length - SHOWN_TERMS}`, "", `= ${show(rest)}`, ""));
  const words = large ? `The ${SHOWN_TERMS} largest of ${terms.length}, and the rest:` : "";
  return [words && element("p", {}, words), element("div", {className: "wide terms"}, made)].filter(Boolean);
}

function listOf(steps) {
  const list = element("dl");
  for (const [what, number] of steps) list.append(element("dt", {}, what), element("dd", {}, number));
  return list;
}

// Does the recomputed number agree with the stored one, as far as rounding lets it?
function verdict(result, stored, slack, dtype) {
  const format = formatName(dtype), off = Math.abs(result - stored), step = stepAt(stored, dtype);
  if (Object.is(result, stored) || result === stored) return ["the same", true];
  if (result === -Infinity) return stored < -1e4
    ? ["the mask of this trace is a large negative number, which does the same", true] : ["not masked here", false];
  if (!Number.isFinite(off)) return ["not the same", false];
  const most = slack + roundingOf(stored, dtype), roughly = x => exactly(+x.toPrecision(2));
  if (off > most) return [`${roughly(off)} apart, where rounding explains ${roughly(most)}: was it made otherwise?`, false];
  return [`${roughly(off)} apart, which is rounding: ${format} has steps of ${roughly(step)} here, and what `
    + `it is made of is rounded too, together up to ${roughly(most)}`, true];
}

function result(found, stored, dtype) {
  const line = element("p", {className: "result"});
  const [words, agrees] = verdict(found.result, stored, found.slack ?? 0, dtype);
  line.append("Recomputed ", element("b", {}, exactly(found.result)), ", stored ", element("b", {}, exactly(stored)), " ",
    element("span", {className: agrees ? "" : "alarm"}, `(${words})`));
  Object.assign(line.dataset, {recomputed: found.result, stored, agrees});
  return line;
}

function sides(name) {  // instead of a difference
  const buttons = now.traces.map((trace, side) => link(trace.name, () => choose({side, cell: now.cell})));
  return ["A difference is no step of the pass. How the number came about, in ", buttons[0], " or in ", buttons[1],
    `? (${partOf(name)})`];
}

function placeOf(name, matrix, row, col) {
  const {shape} = tensorOf(name).info, heads = headsOf(name, shape);
  const at = name === "tokens" || !dimsOf(name) ? `row ${row}` : tokenName(row + skippedRows(name));
  const to = dimsOf(name).endsWith("S") ? `→ ${tokenName(col)}` : name === "logits" ? quoted(col)
    : name === "tokens" ? `position ${col}` : `${columnName(name)} ${col}`;
  return `${name}${heads > 1 ? `, head ${matrix % heads}` : ""}, ${at}${to.startsWith("→") ? " " : ", "}${to}`;
}

async function explain(name, place) {
  const [row, col] = now.cell, matrix = now.head, how = HOW[partOf(name)];
  const stored = (await rowOf(name, matrix, row))[col];
  place.append(element("p", {}, element("b", {}, placeOf(name, matrix, row, col)), ": ", exactly(stored)));
  if (!how) return;
  try {
    const found = await how({name, matrix, row, col});
    place.append(element("p", {}, ...[found.words].flat()));
    if (found.steps?.length) place.append(listOf(found.steps));
    if (found.terms?.length) place.append(...table(found.terms, found.total));
    if (found.note) place.append(element("p", {className: "note"}, found.note));
    if (found.result !== undefined) place.append(result(found, stored, dtypeOf(name)));
  } catch (problem) {
    if (!(problem instanceof Missing)) throw problem;
    place.append(element("p", {className: "note"}, problem.message));
  }
}

export const cellPanel = {
  title: "How this number came about",
  fits: ({name}) => now.cell !== null && name !== LENS,
  async draw({name}, place) {
    place.classList.add("cell");
    place.append(element("button", {className: "close", ariaLabel: "close the number",
      onclick: () => choose({cell: null})}, "×"));
    if (isDifference()) place.append(element("p", {}, ...sides(name)));
    else await explain(name, place);
  },
};
