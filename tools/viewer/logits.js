// What the model predicts after each token.

import {cut, element, link, percent, show} from "./dom.js";
import {bars} from "./picture.js";
import {isDifference, now, pickCell, quoted, tokenIds, tokenName, values} from "./state.js";

const HERE = 10, EACH = 5, MOST_ROWS = 64;

export function likeliest(logits, n) {  // [id, probability, logit]
  let most = -Infinity;
  for (const x of logits) if (x > most) most = x;
  const top = [];
  let sum = 0;
  logits.forEach((x, id) => {
    sum += Math.exp(x - most);
    if (top.length === n && !(x > top.at(-1)[1])) return;
    top.push([id, x]);
    top.sort((a, b) => b[1] - a[1]);
    if (top.length > n) top.pop();
  });
  return top.map(([id, x]) => [id, Math.exp(x - most) / sum, x]);
}

export const logitsPicture = {
  fits: ({name}) => name === "logits" && !isDifference(),
  async draw({name, layout: {rows, cols}, picture, still}) {
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
