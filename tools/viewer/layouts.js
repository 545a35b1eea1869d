// Dumps of other software, read as the script lays its tensors out: other names, no batch, heads side by side, …
// The rules are those of tools/dumps.py: the page and tools/compare.py must say the same of a dump.

import {show} from "./dom.js";
import {dimsOf, inOrder, partOf, sizesOf} from "./model.js";
import {inHalves, ourName, wrapperOf} from "./names.js";
import {MASKED, read} from "./safetensors.js";

// A tensor's axes as lists of factors [size, stride], the slowest first: reading is going along these.
const sizeOf = axis => axis.reduce((n, [size]) => n * size, 1);
const shapeOf = axes => axes.map(sizeOf);
const countOf = shape => shape.reduce((a, b) => a * b, 1);
const last = list => list[list.length - 1];

function axesOf(shape) {
  let stride = 1;
  return [...shape].reverse().map(size => {
    const axis = [[size, stride]];
    stride *= size;
    return axis;
  }).reverse();
}
const replaced = (axes, n, axis) => axes.map((old, i) => i === n ? axis : old);

function transposed(axes) {
  const [a, b, c, ...rest] = axes;
  return [a, c, b, ...rest];
}
const merged = ([a, b, c, ...rest]) => [a, [...b, ...c], ...rest];
function headsApart(axes, n, E) {  // (…, T, n E) as (…, n, T, E)
  const flat = last(axes);
  if (sizeOf(flat) !== n * E || n * E === E || flat.length !== 1 || axes.length !== 3) return null;
  const [[, stride]] = flat;
  return transposed([axes[0], axes[1], [[n, stride * E]], [[E, stride]]]);
}
function everyOf(axes, n, step) {  // each step-th of axis n
  const axis = axes[n], inner = last(axis);
  if (axis.length === 1 && inner[0] % step === 0) return replaced(axes, n, [[inner[0] / step, inner[1] * step]]);
  return axis.length > 1 && inner[0] === step ? replaced(axes, n, axis.slice(0, -1)) : null;
}
function firstOf(axes, n, count) {
  const axis = axes.at(n);
  return axis.length === 1 && axis[0][0] > count
    ? replaced(axes, axes.length + n, [[count, axis[0][1]]]) : null;
}
function toPairs(axes) {  // the first half of the numbers of pairs, then the second, as neighbours
  const axis = last(axes), [size, stride] = axis[0];
  return axis.length === 1 && size % 2 === 0
    ? replaced(axes, axes.length - 1, [[size / 2, stride], [2, stride * size / 2]]) : null;
}

const HALVES = "half-split pairs", REPEATED = "repeated for each query head";
const NEAR = .01;  // a relative error: it is the same tensor
const isHalves = ({words}) => words.endsWith(HALVES);

// The ways to read a tensor of shape `given` as one of the script's shape: {words, axes}; none if it is another's.
// all: the axes with the repeated heads, where some are left out.
function readings(name, given, shape, G) {
  const read = [{words: [], axes: axesOf(given)}], [T, E] = shape.slice(-2), square = /\.(scores|probs)$/.test(name);
  const also = (words, change) => {
    for (const one of [...read]) {
      const axes = change(one.axes);
      if (axes) read.push({words: [...one.words, words], axes, all: words === REPEATED ? one.axes : one.all});
    }
  };
  const inGroups = it => it.length === 4 && shape.length === 4 && sizeOf(it[1]) < shape[1]
    && shape[1] === sizeOf(it[0]) * sizeOf(it[1]);
  also("without a batch axis", it => it.length < shape.length || inGroups(it) ? [[[1, 0]], ...it] : null);
  if (shape.length === 4 && square) {
    also("heads in groups", it => it.length === 5 ? merged(it) : null);
    also("with slots to spare", it => it.length === 4 ? firstOf(it, -1, T) : null);
  } else if (shape.length === 4) {
    for (const n of new Set([shape[1], shape[1] * G])) also("heads side by side", it => headsApart(it, n, E));
    also("positions before heads", it => it.length === 4 ? transposed(it) : null);
    also("grouped", it => it.length === 5 ? merged(it) : null);
    if (G > 1 && /(k|v|k_rotated)$/.test(name))
      also(REPEATED, it => it.length > 1 && sizeOf(it[1]) === shape[1] * G ? everyOf(it, 1, G) : null);
    if (/(q|k|_rotated)$/.test(name)) also(HALVES, toPairs);
  }
  also(`the first ${T} positions`, it => it.length === shape.length ? firstOf(it, -2, T) : null);
  const wanted = [`${shape}`];
  if (name === "norm" || name === "logits") {
    const one = [...shape.slice(0, -2), 1, E];
    if (`${one}` !== `${shape}`) {
      also("of the last position only", it => `${shapeOf(it)}` === `${one}` ? it : null);
      also("of the last position only", it => it.length === 2 ? [it[0], [[1, 0]], it[1]] : null);
      wanted.push(`${one}`);
    }
  }
  const fits = ({words, axes}) => {
    const is = `${shapeOf(axes)}`;
    return is === wanted[0] || (is === wanted[1] && words.join().includes("last"));
  };
  return read.filter(fits).map(({words, ...rest}) => ({words: words.join(", "), ...rest}));
}

// ---------------------------------------------------------------------------------------- names and sizes

const TRACED = /^(tokens|tok_embeddings|norm|logits)$|^layers\.\d+\./;
const isOurs = name => TRACED.test(name) && dimsOf(name) !== "";

function unstacked(found, L) {  // all layers in one tensor become one for each
  const tensors = new Map();
  for (const [name, info] of found) {
    const count = {hidden_states: L + 1, attentions: L}[name];
    if (!count || info.shape.length < 3 || info.shape[0] !== count) tensors.set(name, info);
    else for (let n = 0; n < count; n++) {
      const shape = info.shape.slice(1);
      tensors.set(`${name}.${n}`, {...info, shape, count: countOf(shape), offset: n * countOf(shape)});
    }
  }
  return tensors;
}

function layersIn(found, params) {
  if (params.n_layers) return params.n_layers;
  const most = [...found.keys()].map(name => name.match(/(hidden_states\.)?\b(\d+)\b/))
    .map(hit => hit ? +hit[2] + (hit[1] ? 0 : 1) : 0);
  return Math.max((found.get("hidden_states")?.shape[0] ?? 1) - 1, ...most);
}

function recognised(trace, params) {  // tensors under the script's names
  const plain = new Map(), outer = wrapperOf([...trace.found.keys()]);
  for (const [name, info] of trace.found) plain.set(name.slice(outer.length), info);
  const L = layersIn(plain, params), tensors = new Map();
  for (const [name, info] of unstacked(plain, L)) {
    const [ours, silu] = isOurs(name) ? [name, false] : ourName(name, L) ?? [name, false];
    if (tensors.has(ours) && (silu || !tensors.get(ours).silu)) continue;  // what is not to be computed is better
    const scores = /^layers\.\d+\.attention\.scores$/.test(ours) ? {} : null;  // what is found out of the mask
    tensors.set(ours, {...info, silu, called: name, scores});
  }
  return tensors;
}

const fromParams = ({dim: D, n_heads: H, n_kv_heads: K = H, head_dim, ffn_dim: F, vocab_size: V}) =>
  D && H ? {D, H, K, E: head_dim ?? D / H, F, V} : {};

function positionsIn(tensors, {D, H, E, F, V}) {  // the fewest that a tensor has; 0 where nothing tells
  const found = [];
  for (const [name, {shape, count}] of tensors) {
    const part = partOf(name);
    if (!isOurs(name) || name === "tokens" || /(scores|probs|\.k|k_rotated|\.v)$/.test(part)) continue;
    const perHead = /(\.q|q_rotated|heads)$/.test(part), units = /(gate|up|hidden)$/.test(part);
    const width = perHead ? H * E : name === "logits" ? V : units ? F : D;
    if (!width || (last(shape) !== width && !(perHead && shape.includes(E)))) continue;
    const positions = count / width;
    if (positions >= 1 && !(positions === 1 && (name === "norm" || name === "logits"))) found.push(positions);
  }
  return found.length ? Math.min(...found) : 0;
}

function expected(name, sizes) {  // the shape in the script's layout; null: not known
  const letters = dimsOf(name).split(" "), shape = letters.map(letter => letter === "S" ? sizes.T : sizes[letter]);
  return isOurs(name) && shape.every(Number.isInteger) ? shape : null;
}

// ---------------------------------------------------------------------------------------- choosing among them

function viewed(info, {words, axes}) {
  const shape = shapeOf(axes), plain = axes.flat().filter(([size]) => size > 1);
  let stride = 1, contiguous = true;
  for (const [size, step] of [...plain].reverse()) {
    contiguous &&= step === stride;
    stride *= size;
  }
  return {...info, shape, count: countOf(shape), words, axes: contiguous ? null : axes};
}

async function sameInGroups(trace, info, {all}, G) {  // are the repeated heads that are left out the same?
  const whole = viewed(info, {axes: all}), data = await read(trace, whole), size = countOf(whole.shape.slice(2));
  return data.every((x, i) => x === data[i - Math.floor(i / size) % G * size]);
}

async function distance(trace, info, other, reference) {
  if (`${info.shape}` !== `${reference.shape}`) return Infinity;
  const [x, y] = await Promise.all([read(trace, info), read(other, reference)]);
  let off = 0, norm = 0;
  for (let i = 0; i < x.length; i++) {
    if (x[i] !== y[i]) off += (x[i] - y[i]) ** 2;
    if (Number.isFinite(y[i])) norm += y[i] ** 2;
  }
  const error = Math.sqrt(off / Math.max(norm, 1e-60));
  return Number.isFinite(error) ? error : Infinity;
}

async function byDistance(trace, info, ways, other, reference) {  // the nearest to the reference first
  const found = await Promise.all(ways.map(async way =>
    ({...way, far: await distance(trace, viewed(info, way), other, reference)})));
  return found.sort((a, b) => a.far - b.far);
}

// May q and k hold pairs in two halves? One may look so by chance; a port does it throughout.
function settleHalves(ways, named) {
  const turned = [...ways.keys()].filter(name => /attention\.[qk](_rotated)?$/.test(name));
  const plain = turned.filter(name => !name.endsWith("_rotated")), telling = plain.length ? plain : turned;
  const both = telling.filter(name => new Set(ways.get(name).map(isHalves)).size === 2);
  const total = halves => both.reduce((sum, name) => sum + Math.min(...ways.get(name)
    .filter(way => isHalves(way) === halves).map(({far}) => Math.min(far ?? 10, 10))), 0);
  const totals = [total(false), total(true)];
  const halves = Math.min(...totals) < Math.max(...totals) / 2 ? totals[1] < totals[0] : named;
  for (const name of turned) {
    const fitting = ways.get(name).filter(way => isHalves(way) === halves);
    if (fitting.length && !(ways.get(name)[0].far < NEAR)) ways.set(name, fitting);
  }
}

// The ways to read one tensor, the best first. plain: others have shown that nothing is turned.
async function waysOf(trace, name, beside, plain) {
  const info = trace.tensors.get(name), shape = expected(name, trace.sizes), G = trace.sizes.H / trace.sizes.K || 1;
  if (!shape || name === "tokens" || !info.count) return [];
  const found = [];
  for (const way of readings(name, info.shape, shape, G))
    if (!way.all || await sameInGroups(trace, info, way, G)) found.push(way);
  if (found.length < 2 || !beside || (plain && !found[0].words && isHalves(found[1]))) return found;
  const far = await distance(trace, viewed(info, found[0]), beside.trace, beside.info);
  return far < NEAR ? [{...found[0], far}, ...found.slice(1)]
    : byDistance(trace, info, found, beside.trace, beside.info);
}

async function arrangeOne(trace, reference) {
  const ways = new Map();
  let plain = false;
  for (const name of inOrder([...trace.tensors.keys()])) {
    const info = reference?.tensors.get(name), beside = info && {trace: reference, info};
    const found = await waysOf(trace, name, beside, plain);
    if (!found.length) continue;
    ways.set(name, found);
    plain ||= /attention\.q$/.test(name) && found[0].far < NEAR && !isHalves(found[0]);
  }
  settleHalves(ways, inHalves([...trace.tensors.values()].map(({called}) => called)));
  for (const [name, [way]] of ways) trace.tensors.set(name, viewed(trace.tensors.get(name), way));
}

async function laterOf(trace, info) {  // the numbers of the first matrix that stand for later tokens
  const [rows, cols] = info.shape.slice(-2), data = await read(trace, {...info, scores: null}, 0, rows * cols);
  return data.filter((_, at) => at % cols > Math.floor(at / cols) + cols - rows);
}
// Were scores kept before their mask? Then no number says so, and later tokens have no probs all the same.
async function findMasks(trace) {
  for (const [name, info] of trace.tensors) {
    if (!info.scores || info.shape.length < 2 || !info.count) continue;
    const probs = trace.tensors.get(name.replace("scores", "probs")), later = await laterOf(trace, info);
    if (!later.length || !later.every(x => x > MASKED)) continue;
    info.scores.before = !probs || probs.shape.length < 2 || (await laterOf(trace, probs)).every(x => x === 0);
  }
}

async function tokensOf(trace) {
  const info = trace.tensors.get("tokens");
  if (!info) return;
  if (info.shape.length === 1) Object.assign(info, {shape: [1, ...info.shape], words: "without a batch axis"});
  const T = last(info.shape), rows = Math.min(info.shape.at(-2), 1000);
  if (T) trace.rows = await Promise.all(Array.from({length: rows}, async (_, row) =>
    [...await read(trace, info, row * T, T)]));
}

const fitsOurs = trace => [...trace.tensors].every(([name, {shape}]) =>
  !dimsOf(name) || dimsOf(name).split(" ").length === shape.length);
const isScripts = trace => trace.params.n_layers !== undefined && "texts" in trace.about;
function referenceIn(traces) {  // the script's own trace; of two the first, unless one says that it is the reference
  const said = traces.findIndex(trace => trace.about.reference);
  return said >= 0 ? said : Math.max(0, traces.findIndex(isScripts));
}

// Gives the tensors of traces (1 or 2) the script's names and layout; one that is the script's shows how.
export async function arrange(traces) {
  const known = traces.find(({params}) => params.dim)?.params ?? {};
  for (const trace of traces) {
    trace.tensors = recognised(trace, trace.params.n_layers ? trace.params : known);
    await tokensOf(trace);
    await findMasks(trace);
  }
  const model = {...sizesOf(traces.find(fitsOurs) ?? traces[0]), ...fromParams(known)};
  for (const trace of traces) {
    const own = {...model, ...fromParams(trace.params)}, held = trace.rows[0].length;
    const positions = positionsIn(trace.tensors, own);
    const B = trace.tensors.get("tokens")?.shape[0] ?? (fitsOurs(trace) ? sizesOf(trace).B : 1) ?? 1;
    const each = Math.floor(positions / B);
    trace.halves = await in16Bits(trace);
    trace.sizes = {...own, B, T: Math.min(each || held, held || each) || undefined};
  }
  const at = referenceIn(traces), reference = traces[at];
  await arrangeOne(reference, null);
  for (const trace of traces) if (trace !== reference) await arrangeOne(trace, reference);
  return at;
}

// How a tensor stands in the file, where that is not as the script has it.
export function howRead(name, info) {
  const words = [];
  if (info.called && info.called !== name) words.push(`called ${info.called} in the file`);
  if (info.words) words.push(`read as ${info.words}`);
  if (info.scores?.mask) words.push(`its mask is ${show(info.scores.mask)}, shown as −∞`);
  if (info.scores?.before) words.push("kept before its mask: later tokens are shown as −∞");
  if (info.silu) words.push("silu is computed here");
  return words.join(", ");
}

// ---------------------------------------------------------------------------------------- two traces

function rowsInCommon([a, b]) {  // how many positions have the same tokens before them, in all rows of the batch
  const lengths = [a, b].map(({sizes, rows}) => sizes.T ?? rows[0].length);
  let most = Math.min(...lengths);
  if (a.rows[0].length && b.rows[0].length) a.rows.forEach((ids, row) => {
    const others = b.rows[row] ?? ids, apart = ids.findIndex((id, i) => id !== others[i]);
    if (apart >= 0) most = Math.min(most, apart);
  });
  return most;
}

function narrowed(name, info, P) {  // to the first P positions, and these alone looked at
  let axes = info.axes ?? axesOf(info.shape);
  const letters = dimsOf(name).split(" ");
  for (const [letter, n] of [["T", letters.indexOf("T") - letters.length], ["S", -1]])
    if (letters.includes(letter)) axes = firstOf(axes, n, P) ?? axes;
  return viewed(info, {words: info.words, axes});
}
function lastRow(info) {
  const axes = info.axes ?? axesOf(info.shape), n = axes.length - 2, [[size, stride]] = axes[n];
  const {offset = 0} = info;
  return viewed({...info, offset: offset + (size - 1) * stride}, {words: info.words, axes: replaced(axes, n, [[1, 0]])});
}

// What of two traces can be compared, and why the rest cannot: tensors (by name both entries, of the positions
// with the same tokens before them), why (by name), common (how many positions), lengths.
export function pairOf(traces) {
  const [a, b] = traces, common = rowsInCommon(traces), tensors = new Map(), why = new Map();
  const lengths = traces.map(({sizes, rows}) => rows[0].length || sizes.T);
  for (const name of new Set(traces.flatMap(trace => [...trace.tensors.keys()]))) {
    const infos = traces.map(trace => trace.tensors.get(name));
    if (!infos[0] || !infos[1]) why.set(name, "only in one");
    else if (name !== "tokens" && dimsOf(name).includes("T") && infos.every(({shape}) => shape.length > 1)) {
      const T = infos.map(({shape}) => shape.at(-2)), single = T.includes(1) && T[0] !== T[1];
      const whole = lengths.every(length => length === common);
      const pair = single && whole ? infos.map(info => info.shape.at(-2) === 1 ? info : lastRow(info))
        : infos.map(info => narrowed(name, info, common));
      if (!common) why.set(name, "no token in common");
      else if (single && !whole) why.set(name, "of other positions");
      else if (`${pair[0].shape}` !== `${pair[1].shape}`) why.set(name, "other shape");
      else tensors.set(name, pair);
    } else if (`${infos[0].shape}` === `${infos[1].shape}`) tensors.set(name, infos);
    else why.set(name, "other shape");
  }
  return {tensors, why, common, lengths, sameText: a.rows.length === b.rows.length
    && lengths.every(length => length === common)};
}

// ---------------------------------------------------------------------------------------- numbers of 16 bits

const SAMPLE = 1024, HALF_LEAST = 2 ** -14, HALF_MOST = 65504;
async function isRounded(trace, info) {  // are all numbers numbers of 16 bits, and is one other than 0?
  const data = Float32Array.from(await read(trace, info, 0, SAMPLE)), bits = new Uint32Array(data.buffer);
  if (!data.some(x => x !== 0)) return false;
  const inHalf = x => x === 0 || !Number.isFinite(x) || (Math.abs(x) >= HALF_LEAST && Math.abs(x) <= HALF_MOST);
  return bits.every(it => !(it & 0xffff)) || bits.every((it, i) => !(it & 0x1fff) && inHalf(data[i]));
}
async function in16Bits(trace) {  // it says so; or most of its tensors are
  if (trace.about.dtype) return /16$/.test(trace.about.dtype);
  const telling = [...trace.tensors].filter(([name, {dtype, count}]) =>
    dtype.startsWith("F") + dtype.startsWith("BF") && count && isOurs(name)
    && !["tok_embeddings", "logits"].includes(name) && !name.endsWith("feed_forward.gate"));
  const found = await Promise.all(telling.map(async ([, info]) => info.dtype.endsWith("F16") || isRounded(trace, info)));
  return 2 * found.filter(Boolean).length > found.length;
}
