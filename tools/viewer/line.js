// The values of the chosen token's row, as a line.

import {css, element, readout, show} from "./dom.js";
import {LENS, columnName, dimsOf, isAttention} from "./model.js";
import {canvasOf, pointAt} from "./picture.js";
import {isDifference, now, tokenIds, tokenName, values} from "./state.js";
import {walkable} from "./walking.js";

const HEIGHT = 120, LEFT = 64;

// The least and the greatest of the numbers that fall on each pixel: [low, high, where the farther one is].
function columnsOf(data, width) {
  const n = Math.min(width, data.length), found = [];
  for (let k = 0; k < n; k++) {
    const from = Math.floor(k * data.length / n), to = Math.max(from + 1, Math.floor((k + 1) * data.length / n));
    let low = Infinity, high = -Infinity, at = from, most = -1;
    for (let j = from; j < to; j++) {
      if (!Number.isFinite(data[j])) continue;
      if (data[j] < low) low = data[j];
      if (data[j] > high) high = data[j];
      if (Math.abs(data[j]) > most) [most, at] = [Math.abs(data[j]), j];
    }
    found.push([low, high, at]);
  }
  return found;
}

// A line of numbers: name(j) says what a place is called; label: what they are.
export function lineOfValues(data, width, name, label) {
  const [canvas, pen] = canvasOf(width, HEIGHT), room = width - LEFT - 6, columns = columnsOf(data, room);
  const wordsOf = j => `${name(j)}: ${show(data[j])}`;
  const finite = columns.filter(([low]) => low !== Infinity);
  const low = Math.min(0, ...finite.map(column => column[0])), high = Math.max(0, ...finite.map(column => column[1]));
  const span = high - low || 1, y = x => 8 + (high - x) / span * (HEIGHT - 16);
  const each = room / columns.length, x = k => LEFT + (k + .5) * each;
  pen.fillStyle = css("--faint");
  pen.textAlign = "right";
  pen.fillText(show(high), LEFT - 6, y(high));
  if (low < 0) pen.fillText(show(low), LEFT - 6, y(low));
  if (high > 0 && low < 0 && Math.min(y(0) - 8, HEIGHT - 8 - y(0)) > 14) pen.fillText("0", LEFT - 6, y(0));
  pen.strokeStyle = css("--line");
  pen.strokeRect(LEFT - .5, 7.5, room + 1, HEIGHT - 15);
  pen.beginPath();
  pen.moveTo(LEFT, y(0));
  pen.lineTo(LEFT + room, y(0));
  pen.stroke();
  pen.strokeStyle = css("--mark");
  pen.lineWidth = 1.2;
  pen.beginPath();
  let inLine = false;
  columns.forEach(([a, b], k) => {
    if (a === Infinity) {
      inLine = false;
      return;
    }
    inLine ? pen.lineTo(x(k), y(b)) : pen.moveTo(x(k), y(b));
    if (a !== b || !inLine) pen.lineTo(x(k), y(a) + (a === b ? .01 : 0));
    inLine = true;
  });
  pen.stroke();
  pointAt(canvas, px => {
    const k = Math.floor((px - LEFT) / each);
    if (k >= 0 && k < columns.length) readout(wordsOf(columns[k][2]));
  });
  walkable(canvas, {label, rows: 1, cols: data.length, tell: (i, j) => wordsOf(j),
    boxOf: (i, j) => [LEFT + j / data.length * room, 8, room / data.length, HEIGHT - 16]});
  return canvas;
}

export const linePanel = {
  title: "The chosen token's row, as a line",
  fits: ({name, info, layout: {cols}}) => name !== LENS && name !== "tokens" && info?.count > 0 && cols > 1,
  async draw({name, layout: {rows, cols, size}, picture, still}, place) {
    const skipped = Math.max(0, tokenIds().length - rows);
    const row = Math.max(0, Math.min(now.token - (dimsOf(name) ? skipped : 0), rows - 1));
    const data = await values(name, now.head * size + row * cols, cols);
    if (!still()) return;
    const who = dimsOf(name) ? tokenName(row + skipped) : `row ${row}`;
    const column = j => isAttention(name) ? `→ ${tokenName(j)}` : `${columnName(name)} ${j}`;
    const canvas = lineOfValues(data, Math.max(260, picture.clientWidth - 4), j => `${who} ${column(j)}`,
      `${cols} numbers of ${who}${isDifference() ? ", first − second" : ""}`);
    place.append(element("p", {}, `${who}, ${cols} numbers:`), canvas);
  },
};
