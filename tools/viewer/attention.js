// Scores and probabilities: who looks at whom.

import {legend, rangeOf} from "./colors.js";
import {show} from "./dom.js";
import {isAttention, partOf} from "./model.js";
import {heat} from "./picture.js";
import {isDifference, now, pickCell, tokenName, values} from "./state.js";
import {headThumbnails} from "./tensor.js";

export const attentionPicture = {
  fits: ({name}) => isAttention(name),
  async draw(view) {
    const {name, layout, picture, still} = view, {rows, cols, size} = layout;
    const data = await values(name, now.head * size, size);
    const range = rangeOf(data, isDifference() || partOf(name) === "attention.scores");
    if (!still()) return;
    const words = (i, j, x) => `${tokenName(i)} → ${tokenName(j)}: ${show(x)}`;
    picture.replaceChildren(
      heat(data, rows, cols, {range, square: true, rowName: tokenName, colName: tokenName, words,
        cell: now.cell, pick: pickCell}),
      legend(range, "each row is a token that asks, each column one that answers"));
    if (layout.n > 1) await headThumbnails(view, range);
  },
};
