// A part of a heat map looked at more closely, and its colours' range.

import {rangeOf} from "./colors.js";
import {element} from "./dom.js";
import {heat} from "./picture.js";
import {choose, now} from "./state.js";

const SAMPLE = 200_000, DOUBLE = 300;  // milliseconds: two clicks within them are a double click

// now.reach: "" (the colours reach up to the largest number), "99%" (of the numbers), or a number.
export function reachOf(text) {  // null: it makes no sense
  const found = text.trim().replace(",", ".").match(/^(\d*\.?\d+(?:e[+-]?\d+)?)\s*(%?)$/i);
  if (!found) return text.trim() ? null : {};
  const number = +found[1];
  if (!(number > 0) || (found[2] && number > 100)) return null;
  return found[2] ? {share: number / 100} : {most: number};
}
export function chosenRange(data, signed) {
  const all = rangeOf(data, signed), {share, most} = reachOf(now.reach) ?? {};
  if (most) return {signed, most};
  if (!share) return all;
  const skip = Math.ceil(data.length / SAMPLE), sizes = [];
  for (let i = 0; i < data.length; i += skip) if (Number.isFinite(data[i])) sizes.push(Math.abs(data[i]));
  const sorted = Float64Array.from(sizes).sort(), reached = sorted[Math.ceil(share * sorted.length) - 1];
  return {signed, most: reached || all.most};
}

const whole = (rows, cols) => ({top: 0, left: 0, rows, cols});
export function windowOf(shape, rows, cols) {
  return now.zoom?.of === `${shape}` ? now.zoom : whole(rows, cols);
}
export const isZoomed = shape => now.zoom?.of === `${shape}`;

function within(from, count, all) {  // moved so that it is inside
  const size = Math.max(1, Math.min(all, count));
  return [Math.max(0, Math.min(all - size, from)), size];
}
export function zoomTo(shape, {top, left, rows, cols}, [allRows, allCols]) {
  const [y, high] = within(top, rows, allRows), [x, wide] = within(left, cols, allCols);
  const zoom = high === allRows && wide === allCols ? null : {of: `${shape}`, top: y, left: x, rows: high, cols: wide};
  return choose({zoom}, {keep: true});
}
// Half as much, or twice as much, around the middle or the chosen token.
export function zoomBy(shape, rows, cols, by, square) {
  const {top, left, ...part} = windowOf(shape, rows, cols);
  const high = Math.max(2, Math.round(part.rows * by)), wide = Math.max(2, Math.round(part.cols * by));
  const inside = now.token >= top && now.token < top + part.rows && rows > 1;
  const y = inside ? now.token + .5 : top + part.rows / 2, x = square && inside ? y : left + part.cols / 2;
  return zoomTo(shape, {top: Math.round(y - high / 2), left: Math.round(x - wide / 2), rows: high, cols: wide}, [rows, cols]);
}

function cutOut(data, cols, {top, left, ...part}) {
  const some = new data.constructor(part.rows * part.cols);
  for (let i = 0; i < part.rows; i++) {
    const from = (top + i) * cols + left;
    some.set(data.subarray(from, from + part.cols), i * part.cols);
  }
  return some;
}

function followDrag(frame, canvas, part, zoom) {  // a frame drawn with the mouse is what is looked at next
  let start = null, box = null, dragged = false;
  canvas.addEventListener("click", event => { if (dragged) event.stopImmediatePropagation(); }, true);  // no number is meant
  canvas.addEventListener("pointerdown", event => {
    if (event.pointerType !== "mouse" || event.button || !canvas.cellAt) return;
    start = {at: [event.offsetX, event.offsetY], cell: canvas.cellAt(event.offsetX, event.offsetY)};
    if (!start.cell) start = null;
  });
  canvas.addEventListener("pointermove", event => {
    if (!start) return;
    const [x, y] = start.at, {offsetX: u, offsetY: v} = event;
    if (!box && Math.hypot(u - x, v - y) < 6) return;
    if (!box) {
      box = element("div", {className: "lasso"});
      frame.append(box);
      canvas.setPointerCapture(event.pointerId);
    }
    Object.assign(box.style, {left: `${canvas.offsetLeft + Math.min(x, u)}px`, top: `${canvas.offsetTop + Math.min(y, v)}px`,
      width: `${Math.abs(u - x)}px`, height: `${Math.abs(v - y)}px`});
  });
  const end = event => {
    const cell = box && start && canvas.cellAt(event.offsetX, event.offsetY, true), [from] = [start?.cell];
    dragged = box !== null;
    box?.remove();
    start = box = null;
    if (!cell || !from) return;
    const [a, b] = [0, 1].map(n => Math.min(cell[n], from[n]));
    zoom({top: part.top + a, left: part.left + b, rows: Math.abs(cell[0] - from[0]) + 1,
      cols: Math.abs(cell[1] - from[1]) + 1});
  };
  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", () => {
    box?.remove();
    start = box = null;
  });
}

// A double click shows all of it again: the first of the two waits for the second before it chooses a number.
function followDoubleClick(canvas, all) {
  let waiting;
  canvas.addEventListener("click", event => {
    if (!event.isTrusted) return;
    event.stopImmediatePropagation();
    clearTimeout(waiting);
    if (event.detail < 2) waiting = setTimeout(() => canvas.click(), DOUBLE);
  }, true);
  canvas.ondblclick = all;
}

// heat(), of the part that is zoomed to.
export function sheet(view, data, rows, cols, {rowName, colName, words, mark, cell, pick, ...how}) {
  const part = windowOf(view.shape, rows, cols), {top, left} = part;
  const some = isZoomed(view.shape) ? cutOut(data, cols, part) : data;
  const at = cell && [cell[0] - top, cell[1] - left], seen = at?.every((n, k) => n >= 0 && n < [part.rows, part.cols][k]);
  const canvas = heat(some, part.rows, part.cols, {...how, mark: mark - top, firstColumn: left,
    cell: seen ? at : null, pick: pick && ((i, j) => pick(i + top, j + left)),
    rowName: rowName && (i => rowName(i + top)), colName: colName && (j => colName(j + left)),
    words: (i, j, x) => words(i + top, j + left, x)});
  const frame = element("div", {className: "frame"}, canvas), zoom = to => zoomTo(view.shape, to, [rows, cols]);
  followDrag(frame, canvas, part, zoom);
  if (isZoomed(view.shape)) followDoubleClick(canvas, () => zoom(whole(rows, cols)));
  view.ranged = true;
  view.zoom = {by: factor => zoomBy(view.shape, rows, cols, factor, how.square), all: () => zoom(whole(rows, cols))};
  return frame;
}
