// Which units of the feed-forward answer most.

import {legend, rangeOf} from "./colors.js";
import {element, show} from "./dom.js";
import {isUnits} from "./model.js";
import {bars, heat} from "./picture.js";
import {isDifference, now, tokenName, values} from "./state.js";

const TOP = 40, BARS = 12;

function strongestOf(data, cols) {
  const strongest = new Float32Array(cols);
  data.forEach((x, i) => { if (Math.abs(x) > strongest[i % cols]) strongest[i % cols] = Math.abs(x); });
  return strongest;
}
const largest = (n, most, size) => Array.from({length: n}, (_, i) => i)
  .sort((a, b) => size(b) - size(a)).slice(0, most);

export const unitsPicture = {
  fits: ({name, layout}) => isUnits(name) && now.token < layout.rows,
  async draw({name, layout, picture, still}) {
    const {rows, cols, size} = layout, data = await values(name, now.head * size, size);
    if (!still()) return;
    const strongest = strongestOf(data, cols), top = largest(cols, TOP, j => strongest[j]);
    const at = j => data[now.token * cols + j], here = largest(cols, BARS, j => Math.abs(at(j)));
    const some = new Float32Array(rows * top.length);
    for (let i = 0; i < rows; i++) top.forEach((j, k) => { some[i * top.length + k] = data[i * cols + j]; });
    const range = rangeOf(some, true);
    const words = (i, j, x) => `${tokenName(i)}, unit ${top[j]}: ${show(x)}`;
    picture.replaceChildren(
      element("p", {}, `The ${top.length} units of ${cols} that ${isDifference() ? "differ most" : "are strongest"} anywhere:`),
      heat(some, rows, top.length,
        {range, rowName: tokenName, colName: j => `${top[j]}`, words, mark: now.token}),
      legend(range),
      element("p", {}, `Those that ${isDifference() ? "differ most" : "are strongest"} at ${tokenName(now.token)} (position ${now.token}; `
        + "choose another token above):"),
      bars(here.map(j => [`unit ${j}`, at(j), show(at(j))])));
  },
};
