// The pass as its tensors' names tell it: which there are, their dims, what each is made of.

const LAYER = {  // part of a layer: dims, and what it is made of ("before": the residual stream that comes in)
  attention_norm: ["B T D", "before"],
  "attention.q": ["B H T E", "attention_norm"],
  "attention.k": ["B K T E", "attention_norm"],
  "attention.v": ["B K T E", "attention_norm"],
  "attention.q_rotated": ["B H T E", "attention.q"],
  "attention.k_rotated": ["B K T E", "attention.k"],
  "attention.scores": ["B H T S", "attention.q_rotated", "attention.k_rotated"],
  "attention.probs": ["B H T S", "attention.scores"],
  "attention.heads": ["B H T E", "attention.probs", "attention.v"],
  "attention.out": ["B T D", "attention.heads"],
  after_attention: ["B T D", "before", "attention.out"],
  ffn_norm: ["B T D", "after_attention"],
  "feed_forward.gate": ["B T F", "ffn_norm"],
  "feed_forward.up": ["B T F", "ffn_norm"],
  "feed_forward.hidden": ["B T F", "feed_forward.gate", "feed_forward.up"],
  "feed_forward.out": ["B T D", "feed_forward.hidden"],
  out: ["B T D", "after_attention", "feed_forward.out"],
};
const WHOLE = {
  tokens: ["B T"],
  tok_embeddings: ["B T D", "tokens"],
  norm: ["B T D", "before"],
  logits: ["B T V", "norm"],
};
export const LENS = "logit lens";  // of the tensors lens.ids and lens.probs together
const FIRST = ["tokens", "tok_embeddings"], LAST = ["norm", "logits", LENS], PARTS = Object.keys(LAYER);

export const layerOf = name => {  // a number; undefined outside of the layers
  const found = name.match(/^layers\.(\d+)\./);
  return found ? +found[1] : undefined;
};
export const partOf = name => name.replace(/^layers\.\d+\./, "");
export const inLayer = name => layerOf(name) !== undefined;
const entryOf = name => (inLayer(name) ? LAYER : WHOLE)[partOf(name)];
export const dimsOf = name => entryOf(name)?.[0] ?? "";
export const isLens = name => /^(lens|attribution)\./.test(name);  // they stand beside the pass

function placeInPass(name) {
  if (FIRST.includes(name)) return [0, FIRST.indexOf(name), 0];
  const part = PARTS.indexOf(partOf(name));
  if (inLayer(name)) return [1, layerOf(name), part < 0 ? PARTS.length : part];
  return LAST.includes(name) ? [2, LAST.indexOf(name), 0] : [3, 0, 0];
}

export function inOrder(names) {  // of the pass; a file holds them in another
  const placed = names.map(name => ({name, place: placeInPass(name)}));
  placed.sort(({name: x, place: a}, {name: y, place: b}) =>
    a[0] - b[0] || a[1] - b[1] || a[2] - b[2] || (x < y ? -1 : 1));
  return placed.map(({name}) => name);
}

export const layerCount = names => Math.max(0, ...names.map(name => (layerOf(name) ?? -1) + 1));

function before(layer) {  // the residual stream that comes into a layer; layer L: into the final norm
  return layer > 0 ? `layers.${layer - 1}.out` : "tok_embeddings";
}
export function inputsOf(name, names) {  // those of `names` that a tensor is made of
  const layer = layerOf(name), [, ...inputs] = entryOf(name) ?? [""];
  const full = input => input === "before" ? before(layer ?? layerCount(names))
    : layer === undefined ? input : `layers.${layer}.${input}`;
  return inputs.map(full).filter(input => names.includes(input));
}
export const outputsOf = (name, names) => names.filter(other => inputsOf(other, names).includes(name));

export const LETTERS = {
  B: "batch", T: "tokens", S: "positions looked at", D: "model dim", H: "query heads", K: "key/value heads",
  G: "query heads that share a key/value head", E: "head dim", F: "feed-forward dim", V: "vocabulary", L: "layers",
};

// What each letter of the dims is in a trace, such as {B: 1, T: 9, D: 256, H: 8}; G = H / K, L layers.
export function sizesOf(trace) {
  const sizes = {L: layerCount([...trace.tensors.keys()])};
  for (const [name, {shape}] of trace.tensors) {
    const letters = dimsOf(name).split(" ");
    if (letters.length === shape.length) letters.forEach((letter, i) => { sizes[letter] ??= shape[i]; });
  }
  if (sizes.H && sizes.K) sizes.G = sizes.H / sizes.K;
  return sizes;
}

// Leading dims, such as rows of a batch and heads, and then a matrix: n matrices of rows × cols.
export function matricesOf(name, shape) {
  const [rows, cols] = shape.length > 1 ? shape.slice(-2) : [1, shape[0] ?? 1];
  const n = Math.max(1, shape.slice(0, -2).reduce((a, b) => a * b, 1));
  const perHead = dimsOf(name).split(" ").length === 4 && shape.length === 4;
  return {rows, cols, size: rows * cols, n, heads: perHead ? shape[1] : 1, perHead};
}
export function matrixName(name, shape, i) {
  const {heads, perHead} = matricesOf(name, shape);
  if (!perHead) return `part ${i}`;
  return (shape[0] > 1 ? `row ${Math.floor(i / heads)}, ` : "") + `head ${i % heads}`;
}
export const columnName = name =>
  ({D: "dim", E: "dim", F: "unit", V: "token id", S: "position"})[dimsOf(name).at(-1)] ?? "column";

export const isAttention = name => inLayer(name) && /^attention\.(scores|probs)$/.test(partOf(name));
const STREAM = /^(tok_embeddings|after_attention|out|attention\.out|feed_forward\.out)$/;
export const isStream = name => STREAM.test(partOf(name));  // it is the residual stream, or is added to it
export const isUnits = name => inLayer(name) && /^feed_forward\.(gate|up|hidden)$/.test(partOf(name));
export const isPaired = (name, shape) =>
  inLayer(name) && /^attention\.[qk](_rotated)?$/.test(partOf(name)) && shape.at(-1) % 2 === 0;
