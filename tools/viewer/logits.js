// What the model predicts after each token.

import {predictions} from "./beside.js";
import {legend, rangeOf} from "./colors.js";
import {cut, element, link, percent, show} from "./dom.js";
import {bars, heat} from "./picture.js";
import {likeliest} from "./predictions.js";
import {isDifference, now, pickCell, quoted, tokenIds, tokenName, values} from "./state.js";

const HERE = 10, EACH = 5, MOST_ROWS = 64;

async function bothOf({name, layout: {rows, cols, size}, picture, still}) {
  const data = await values(name, now.head * size, size), range = rangeOf(data, true);
  const position = rows === 1 ? tokenIds().length - 1 : Math.min(now.token, rows - 1), both = await predictions(position);
  if (!still()) return;
  const place = i => tokenName(rows === 1 ? position : i);
  picture.replaceChildren(
    element("p", {}, `What comes after ${tokenName(position)} (position ${position}; choose another token above)?`), both,
    element("p", {}, "Difference of the logits, first − second:"),
    heat(data, rows, cols, {range, rowName: place, mark: rows === 1 ? -1 : now.token,
      words: (i, j, x) => `${place(i)}, token id ${j} ${quoted(j)}: ${show(x)}`,
      cell: now.cell, pick: pickCell}), legend(range));
}

export const logitsPicture = {
  fits: ({name}) => name === "logits",
  async draw(view) {
    if (isDifference()) return bothOf(view);
    const {name, layout: {rows, cols}, picture, still} = view;
    const rowAt = row => values(name, (now.head * rows + row) * cols, cols);
    const at = Math.min(now.token, rows - 1), here = likeliest(await rowAt(at), HERE);
    if (!still()) return;
    const after = rows === 1 ? tokenIds().length - 1 : at, table = element("table");
    picture.replaceChildren(
      element("p", {}, `What comes after ${tokenName(after)} (position ${after}; choose another token above)?`),
      bars(here.map(([id, p, x]) => [link(quoted(id), () => pickCell(at, id)), p, `${percent(p)} %  (${show(x)})`])),
      element("p", {}, "After each token, the five likeliest"
        + `${rows > MOST_ROWS ? `, for ${MOST_ROWS} positions around the chosen one` : ""}:`),
      element("div", {className: "wide"}, table));
    const start = Math.max(0, Math.min(now.token - 31, rows - MOST_ROWS));
    for (let i = start; i < Math.min(rows, start + MOST_ROWS); i++) {
      const top = likeliest(await rowAt(i), EACH), position = rows === 1 ? after : i;
      if (!still()) return;
      const heads = [`${position}`, tokenName(position)].map(text => element("th", {}, text));
      const cells = top.map(([id, p]) => element("td", {}, link(
        `${cut(quoted(id), 16)} ${percent(p, 0)}%`, () => pickCell(i, id))));
      const row = element("tr", {}, ...heads, ...cells);
      row.setAttribute("aria-selected", position === now.token);
      table.append(row);
    }
  },
};
