// Two traces side by side, where a difference says nothing: predictions, and the last tokens of two prompts.

import {legend, rangeOf} from "./colors.js";
import {element, percent, show} from "./dom.js";
import {LENS, columnName, dimsOf, isAttention, matricesOf} from "./model.js";
import {bars, heat} from "./picture.js";
import {likeliest} from "./predictions.js";
import {read} from "./safetensors.js";
import {now, quoted, tokenName} from "./state.js";

const BEST = 10;
const idsOf = trace => trace.rows[now.row] ?? trace.rows[0];

async function rowOf(trace, name, row) {  // its numbers in the chosen head; row: from 0, or -1 for the last
  const info = trace.tensors.get(name), {rows, cols, n} = matricesOf(name, info.shape);
  const at = row < 0 || rows === 1 ? rows - 1 : Math.min(row, rows - 1);
  return read(trace, info, (Math.min(now.head, n - 1) * rows + at) * cols, cols);
}
function nameAt(trace, position) {
  const ids = idsOf(trace), at = position < 0 ? Math.max(0, ids.length - 1) : position;
  return `${tokenName(at, ids, trace)} at ${at}`;
}

// What each of the two predicts after a position; -1: after its last token.
export async function predictions(position) {
  const parts = await Promise.all(now.traces.map(async trace => {
    const best = likeliest(await rowOf(trace, "logits", position), BEST);
    return element("div", {}, element("p", {}, `${trace.name}, after ${nameAt(trace, position)}:`),
      bars(best.map(([id, p, x]) => [quoted(id, trace), p, `${percent(p)} %  (${show(x)})`])));
  }));
  return element("div", {className: "beside"}, ...parts);
}

function likeness(a, b) {
  let ab = 0, aa = 0, bb = 0;
  for (let i = 0; i < a.length; i++) {
    ab += a[i] * b[i];
    aa += a[i] ** 2;
    bb += b[i] ** 2;
  }
  return `Sizes ${show(Math.sqrt(aa))} and ${show(Math.sqrt(bb))}, cosine ${show(ab / Math.sqrt(aa * bb))}.`;
}

async function vectors(name, picture) {
  const [a, b] = await Promise.all(now.traces.map(trace => rowOf(trace, name, -1)));
  if (a.length !== b.length) return [`One has ${a.length} numbers, the other ${b.length}: they cannot be compared.`];
  const data = Float64Array.from([...a, ...b]), range = rangeOf(data, true);
  const who = i => `${now.traces[i].name}, ${nameAt(now.traces[i], -1)}`;
  const words = (i, j, x) => `${who(i)}, ${columnName(name)} ${j}: ${show(x)}`;
  return [element("p", {}, `Above ${who(0)}, below ${who(1)}. ${likeness(a, b)}`),
    heat(data, 2, a.length, {range, words, label: picture, rowName: i => now.traces[i].name}), legend(range)];
}

async function weights(name, picture) {  // to the tokens of each prompt
  const parts = [], signed = name.endsWith("scores");
  for (const trace of now.traces) {
    const data = await rowOf(trace, name, -1), range = rangeOf(data, signed), ids = idsOf(trace);
    const column = j => tokenName(j, ids, trace);
    parts.push(element("p", {}, `${trace.name}, ${nameAt(trace, -1)}:`),
      heat(data, 1, data.length, {range, label: `${picture}, ${trace.name}`, colName: column, rowName: () => "last token",
        words: (i, j, x) => `${nameAt(trace, -1)} → ${column(j)}: ${show(x)}`}), legend(range));
  }
  return parts;
}

export const lastPanel = {
  title: "The last tokens, side by side",
  always: true,  // also where there is no picture
  fits: ({name}) => now.both !== null && !now.both.sameText && name !== LENS && dimsOf(name).includes("T")
    && name !== "tokens" && now.traces.every(trace => trace.tensors.get(name)?.count),
  async draw({name}, place) {
    const picture = `${name}, last tokens side by side`;
    place.append(...name === "logits" ? [await predictions(-1)] : isAttention(name) ? await weights(name, picture)
      : await vectors(name, picture));
  },
};
