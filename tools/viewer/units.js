// Which units of the feed-forward answer most.

import {legend} from "./colors.js";
import {element, link, show} from "./dom.js";
import {isUnits} from "./model.js";
import {bars, heat} from "./picture.js";
import {chosenRange} from "./sheet.js";
import {isDifference, now, pickCell, tokenName, values} from "./state.js";

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
  async draw(view) {
    const {name, layout: {rows, cols, size}, picture, still} = view, data = await values(name, now.head * size, size);
    if (!still()) return;
    view.ranged = true;
    const strongest = strongestOf(data, cols), top = largest(cols, TOP, j => strongest[j]);
    const at = j => data[now.token * cols + j], here = largest(cols, BARS, j => Math.abs(at(j)));
    const some = new Float32Array(rows * top.length);
    for (let i = 0; i < rows; i++) top.forEach((j, k) => { some[i * top.length + k] = data[i * cols + j]; });
    const range = chosenRange(some, true);
    const cell = now.cell && [now.cell[0], top.indexOf(now.cell[1])];
    const words = (i, j, x) => `${tokenName(i)}, unit ${top[j]}: ${show(x)}`;
    picture.replaceChildren(
      element("p", {}, `The ${top.length} units of ${cols} that ${isDifference() ? "differ most" : "are strongest"} anywhere:`),
      heat(some, rows, top.length,
        {range, rowName: tokenName, colName: j => `${top[j]}`, words, mark: now.token,
          cell: cell?.[1] >= 0 ? cell : null, pick: (i, j) => pickCell(i, top[j])}),
      legend(range),
      element("p", {}, `Those that ${isDifference() ? "differ most" : "are strongest"} at ${tokenName(now.token)} (position ${now.token}; `
        + "choose another token above):"),
      bars(here.map(j => [link(`unit ${j}`, () => pickCell(now.token, j)), at(j), show(at(j))])));
  },
};
