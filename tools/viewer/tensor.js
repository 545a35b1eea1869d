// Any tensor as a grid of numbers, one matrix a head, and the table of tokens.

import {legend, rangeOf} from "./colors.js";
import {$, element, show} from "./dom.js";
import {columnName, dimsOf, isAttention, matrixName} from "./model.js";
import {small, thumbnails} from "./picture.js";
import {chosenRange, sheet} from "./sheet.js";
import {choose, now, pickCell, quoted, tokenIds, tokenName, values} from "./state.js";

const MOST_THUMB_ROWS = 96, THUMB = 68, MOST_TOKENS = 5000;

async function someRows(name, i, {rows, cols, size}) {  // of a large matrix every few rows
  const skip = Math.ceil(rows / MOST_THUMB_ROWS);
  if (skip === 1) return values(name, i * size, size);
  const some = new Float32Array(Math.ceil(rows / skip) * cols);
  for (let row = 0; row < rows; row += skip)
    some.set(await values(name, i * size + row * cols, cols), row / skip * cols);
  return some;
}

// Of each matrix one thumbnail. Unsigned ones share the range of the large picture.
export function headThumbnails({name, shape, layout, still}, range) {
  return thumbnails({n: layout.n, chosen: now.head, still, label: i => matrixName(name, shape, i),
    pick: head => choose({head}),
    draw: async i => {
      const some = await someRows(name, i, layout), own = range.signed ? rangeOf(some, true) : range;
      return small(some, some.length / layout.cols, layout.cols, own, THUMB);
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
    const heads = ["position", "id", "text"].map(text => element("th", {}, text));
    const table = element("table", {}, element("tr", {}, ...heads));
    tokenIds().slice(0, MOST_TOKENS).forEach((id, i) => {
      const cells = [`${i}`, `${id}`, quoted(id)].map(text => element("td", {}, text));
      const row = element("tr", {onclick: () => pickCell(now.row, i)}, ...cells);
      row.setAttribute("aria-selected", now.cell?.[1] === i);
      table.append(row);
    });
    picture.replaceChildren(element("div", {className: "wide"}, table));
  },
};
