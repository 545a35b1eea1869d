// Where two traces differ: over heads, positions and layers, and the number that differs most.

import {differs, errorText, jumpTo, placeAt, whereText} from "./compare.js";
import {stats, watchCounts} from "./counting.js";
import {legend, rangeOf} from "./colors.js";
import {element, show} from "./dom.js";
import {LENS, inLayer, layerOf, matricesOf, matrixName, partOf} from "./model.js";
import {heat} from "./picture.js";
import {now, sameShape, tokenName} from "./state.js";
import {relative} from "./statistics.js";

const layoutOf = name => matricesOf(name, now.both.tensors.get(name)[0].shape);

// Errors of a tensor by matrix and position: sums over what `key` gives the same number for.
function errorsBy(name, count, key) {
  const {apart} = stats.get(name), off = new Float64Array(count), norm = new Float64Array(count);
  apart.off.forEach((x, i) => {
    off[key(i)] += x;
    norm[key(i)] += apart.norm[i];
  });
  return Array.from(off, (x, i) => relative(x, norm[i]));
}
const byPosition = (name, rows) => errorsBy(name, rows, i => i % rows);
const byMatrix = (name, rows, n) => errorsBy(name, n, i => Math.floor(i / rows));

function drawing(title, errors, rowNames, colNames, pick) {
  const data = Float64Array.from(errors.flat()), range = rangeOf(data, false), [rows, cols] = [errors.length, errors[0].length];
  const words = (i, j, x) => `${rowNames(i)}, ${colNames(j)}: relative error ${show(x)}`;
  return element("div", {}, element("p", {}, title), heat(data, rows, cols, {range, words, pick, label: title,
    rowName: rowNames, colName: cols <= 64 ? colNames : undefined}), legend(range, "relative error; a click goes there"));
}

function largestIn(name, matrix, row) {  // what stands out in a part is what is gone to
  const {apart} = stats.get(name), {rows, cols} = layoutOf(name);
  const place = apart.at >= 0 ? placeAt(name, apart.at) : null;
  const col = place?.matrix === matrix && place.row === row ? place.col : 0;
  return (matrix * rows + row) * cols + col;
}
const worst = list => list.reduce((best, x, i) => x > list[best] ? i : best, 0);

function drawingsOf(name) {
  const {n, rows} = layoutOf(name), {shape} = now.both.tensors.get(name)[0], parts = [];
  const head = i => matrixName(name, shape, i), position = j => rows === 1 ? "the last position" : tokenName(j);
  const all = Array.from({length: n}, (_, i) => Array.from({length: rows}, (_, j) =>
    relative(stats.get(name).apart.off[i * rows + j], stats.get(name).apart.norm[i * rows + j])));
  parts.push(drawing(n > 1 ? "Error over heads and positions" : "Error over positions", all, n > 1 ? head : () => "error",
    position, (i, j) => jumpTo(name, largestIn(name, i, j))));
  if (!inLayer(name)) return parts;
  const others = now.names.filter(other => partOf(other) === partOf(name) && inLayer(other) && stats.get(other)?.apart
    && `${now.both.tensors.get(other)[0].shape}` === `${shape}`);
  if (others.length < 2) return parts;
  const layer = i => `layer ${layerOf(others[i])}`;
  const rowsOf = others.map(other => byPosition(other, rows));
  parts.push(drawing("Error over layers and positions", rowsOf, layer, position, (i, j) =>
    jumpTo(others[i], largestIn(others[i], worst(byMatrix(others[i], rows, n)), j))));
  if (n > 1) parts.push(drawing("Error over layers and heads", others.map(other => byMatrix(other, rows, n)), layer, head,
    (i, j) => jumpTo(others[i], largestIn(others[i], j, now.token < rows ? now.token : 0))));
  return parts;
}

let fill = null;  // the panel that there is now, once more
export const wherePanel = {
  title: "Where the two differ",
  fits: ({name}) => now.both !== null && name !== LENS && sameShape(name) && name !== "tokens",
  async draw({name, still}, place) {
    fill = () => {
      if (!still()) return;
      const found = stats.get(name);
      if (!found) return place.replaceChildren("Comparing …");
      const line = element("p", {}, `${errorText(found)[0].toUpperCase()}${errorText(found).slice(1)}`
        + (differs(name) ? "" : found.error === 0 ? ": every number is the same" : ": no more than rounding"));
      if (found.apart.most) line.append("; ", element("button", {id: "largest",
        onclick: () => jumpTo(name, found.apart.at)}, whereText(name, found)));
      place.replaceChildren(line, ...found.apart.most ? drawingsOf(name) : []);
    };
    fill();
  },
};
export function followWhere() {
  watchCounts(name => {
    if (name !== undefined && fill && now.both && partOf(name) === partOf(now.name)) fill();
  });
}
