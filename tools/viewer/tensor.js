// Any tensor as a grid of numbers, one matrix a head, and the table of tokens.

import {dark, legend, rangeOf} from "./colors.js";
import {element, show} from "./dom.js";
import {columnName, dimsOf, isAttention, matrixName} from "./model.js";
import {small, thumbnails} from "./picture.js";
import {chosenRange, sheet} from "./sheet.js";
import {choose, isDifference, now, pickCell, tokenIds, tokenName, values} from "./state.js";

const THUMB = 68, MOST_TOKENS = 5000, AT_ONCE = 1 << 20;  // numbers that are read at once

// A thumbnail of each matrix, in its own colours. They are read some at a time, and drawn once.
export function headThumbnails({name, shape, layout, still}, {signed}) {
  const {n, rows, cols, size} = layout, each = Math.max(1, Math.floor(AT_ONCE / size));
  let first = -1, held = null;
  return thumbnails({n, chosen: now.head, still, label: i => matrixName(name, shape, i),
    pick: head => choose({head}), of: `${name} ${now.side} ${shape} ${dark.matches} ${now.traces.map(trace => trace.name)}`,
    draw: async i => {
      if (!held || i >= first + each) {
        first = i;
        held = await values(name, i * size, Math.min(each, n - i) * size);
      }
      const some = held.subarray((i - first) * size, (i - first + 1) * size);
      return small(some, rows, cols, rangeOf(some, signed), THUMB);
    }});
}

export const matrixPicture = {
  fits: () => true,
  async draw(view) {
    const {name, layout, picture, still} = view, {rows, cols, size} = layout;
    const data = await values(name, now.head * size, size), range = chosenRange(data, true);
    if (!still()) return;
    const skipped = Math.max(0, tokenIds().length - rows);  // of norm, some ports keep the last position only
    const place = i => dimsOf(name) && !isAttention(name) ? tokenName(i + skipped) : `${i}`;
    const words = (i, j, x) => `${place(i)}, ${columnName(name)} ${j}: ${show(x)}`;
    picture.replaceChildren(
      sheet(view, data, rows, cols, {range, rowName: place, words, mark: now.token - skipped,
        cell: now.cell, pick: pickCell}), legend(range));
    if (layout.n > 1) await headThumbnails(view, range);
  },
};

export const tokensPicture = {
  fits: ({name}) => name === "tokens" && tokenIds().length > 0,
  draw({picture}) {
    const traces = isDifference() ? now.traces : [now.traces[now.side]], lists = traces.map(({rows}) => rows[now.row] ?? rows[0]);
    const names = traces.flatMap(({name}) => traces.length > 1 ? [`id in ${name}`, `text in ${name}`] : ["id", "text"]);
    const table = element("table", {}, element("tr", {}, ...["position", ...names].map(text => element("th", {}, text))));
    const most = Math.min(MOST_TOKENS, Math.max(...lists.map(ids => ids.length)));
    for (let i = 0; i < most; i++) {
      const cells = lists.flatMap((ids, n) => i in ids ? [`${ids[i]}`, tokenName(i, ids, traces[n])] : ["", ""]);
      const row = element("tr", {onclick: () => pickCell(now.row, i)},
        ...[`${i}`, ...cells].map(text => element("td", {}, text)));
      row.setAttribute("aria-selected", now.cell?.[1] === i);
      if (lists.some(ids => ids[i] !== lists[0][i])) row.className = "differs";
      table.append(row);
    }
    picture.replaceChildren(isDifference() ? element("p", {}, "Ids are the same or not; where they are not, the row is marked.")
      : "", element("div", {className: "wide"}, table));
  },
};
