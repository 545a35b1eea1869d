// Scores and probabilities: who looks at whom.

import {dark, legend} from "./colors.js";
import {element, show} from "./dom.js";
import {gaze} from "./gaze.js";
import {headsPicture} from "./heads.js";
import {lookOf} from "./looks.js";
import {isAttention, matrixName, partOf} from "./model.js";
import {patternCanvas, patternsOf} from "./patterns.js";
import {thumbnails} from "./picture.js";
import {chosenRange, sheet} from "./sheet.js";
import {choose, isDifference, now, pickCell, tokenName, values} from "./state.js";

const THUMB = 68;

async function allHeads({name, shape, layout, still}, signed) {  // of this layer
  const found = await patternsOf(name, still), from = layout.perHead ? layout.heads * now.row : 0;
  if (!found || !still()) return;
  await thumbnails({n: found.length, chosen: now.head - from, still,
    of: `${name} ${now.side} ${now.row} ${shape} ${dark.matches} ${now.traces.map(trace => trace.name)}`,
    label: head => matrixName(name, shape, from + head),
    draw: head => patternCanvas(found[head], signed, THUMB), pick: head => choose({head: from + head})});
}

export const attentionPicture = {
  fits: ({name}) => isAttention(name),
  async draw(view) {
    const {name, layout, picture, still} = view, {rows, cols, size} = layout;
    if (lookOf(name) === "heads") return headsPicture.draw(view);
    const data = await values(name, now.head * size, size);
    const signed = isDifference() || partOf(name) === "attention.scores", range = chosenRange(data, signed);
    const text = await gaze(view);
    if (!still()) return;
    const words = (i, j, x) => `${tokenName(i)} → ${tokenName(j)}: ${show(x)}`;
    const place = element("div");
    picture.replaceChildren(text?.place ?? "", place);
    text?.shown();
    const spare = text ? text.place.offsetHeight : 0;
    place.replaceChildren(
      sheet(view, data, rows, cols, {range, square: true, rowName: tokenName, colName: tokenName, words,
        mark: now.token, spare, cell: now.cell, pick: pickCell}),
      legend(range, "each row is a token that asks, each column one that answers"));
    if (layout.n > 1) await allHeads(view, signed);
  },
};
