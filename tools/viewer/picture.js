// What pictures are made of: canvases, heat maps, bars, thumbnails.

import {paletteOf, rgb} from "./colors.js";
import {$, css, cut, element, readout, show} from "./dom.js";
import {matricesOf, matrixName} from "./model.js";
import {current, infoOf, isDifference, now} from "./state.js";
import {walkable} from "./walking.js";

export function canvasOf(width, height) {  // and its pen, in pixels of the page
  const scale = devicePixelRatio || 1;
  const canvas = element("canvas", {width: width * scale, height: height * scale});
  Object.assign(canvas.style, {width: `${width}px`, height: `${height}px`});
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.font = "11px ui-monospace, monospace";
  pen.textBaseline = "middle";
  return [canvas, pen];
}

export function pointAt(canvas, tell) {  // tell(x, y), in the canvas's own pixels, wherever one points
  const told = event => {
    const box = canvas.getBoundingClientRect(), zoom = parseFloat(canvas.style.width) / box.width;
    tell((event.clientX - box.left) * zoom, (event.clientY - box.top) * zoom);
  };
  canvas.addEventListener("pointermove", told);
  canvas.addEventListener("pointerdown", told);
}

// More rows or columns than pixels: of each group the number farthest from zero stands for all.
export function binned(data, rows, cols, mostRows, mostCols) {
  const r = Math.ceil(rows / mostRows), c = Math.ceil(cols / mostCols);
  const R = Math.ceil(rows / r), C = Math.ceil(cols / c), none = 2 ** 32 - 1;
  const pick = new Uint32Array(R * C).fill(none), best = new Float64Array(R * C);
  const bin = Uint32Array.from({length: cols}, (_, j) => j / c | 0);
  for (let i = 0; i < rows; i++) for (let j = 0, row = (i / r | 0) * C; j < cols; j++) {
    const at = i * cols + j, x = data[at], to = row + bin[j];
    const size = x !== x ? Infinity : x === -Infinity ? -1 : x < 0 ? -x : x;
    if (pick[to] !== none && !(size > best[to])) continue;
    pick[to] = at;
    best[to] = size;
  }
  return {R, C, pick};
}

export function image(data, {R, C, pick}, range) {  // a pixel a number
  const canvas = element("canvas", {width: C, height: R}), pen = canvas.getContext("2d");
  const pixels = pen.createImageData(C, R), bytes = new Uint32Array(pixels.data.buffer);
  const toColour = paletteOf(range);
  pick.forEach((at, i) => { bytes[i] = toColour(data[at]); });
  pen.putImageData(pixels, 0, 0);
  return canvas;
}

export function small(data, rows, cols, range, width, height = width) {  // a thumbnail of a matrix
  const bins = binned(data, rows, cols, 96, 96), [canvas, pen] = canvasOf(width, height);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(image(data, bins, range), 0, 0, width, height);
  return canvas;
}

function heatLayout(rows, cols, {square, rowName, colName, spare = 0}, bin) {
  const width = Math.max(240, $("picture").clientWidth - 4), left = rowName ? 96 : 8;
  const most = square ? Math.min(width - left, innerHeight - 420) : width - left;
  const names = colName && cols * 12 <= most, top = names ? 84 : 18;
  const above = Math.min($("picture").offsetTop, innerHeight / 2) + spare + 160;
  const room = Math.max(spare ? 200 : 240, innerHeight - above - top);  // so that the heads below stay in sight
  const bins = bin(700, Math.floor(width - left));
  const across = (width - left) / bins.C, down = room / bins.R;
  const cellX = square ? Math.min(44, across, down) : Math.min(60, across);
  const cellY = square ? cellX : Math.max(1, Math.min(22, down));
  const wide = cellX * bins.C, high = cellY * bins.R;
  return {bins, left, top, names, cellX, cellY, wide, high, eachX: wide / cols, eachY: high / rows};
}

function rowNames(pen, rows, rowName, {left, top, eachY}) {
  pen.textAlign = "right";
  const every = Math.max(1, Math.ceil(12 / eachY));
  for (let i = 0; i < rows; i += every) pen.fillText(cut(rowName(i)), left - 5, top + (i + .5) * eachY);
  pen.textAlign = "left";
}
function colNames(pen, cols, colName, first, {left, top, names, eachX, wide}) {
  if (!names) {
    pen.fillText(`${first}`, left, 8);
    pen.textAlign = "right";
    pen.fillText(`${first + cols - 1}`, left + wide, 8);
    return;
  }
  for (let j = 0; j < cols; j++) {
    pen.save();
    pen.translate(left + (j + .5) * eachX, top - 5);
    pen.rotate(-Math.PI / 2);
    pen.fillText(cut(colName(j), 12), 0, 0);
    pen.restore();
  }
}

// What a picture of the chosen tensor shows, in words.
export function nameOfPicture(what = "") {
  const {shape} = infoOf(now.name) ?? {shape: []}, {n} = matricesOf(now.name, shape);
  const side = now.traces.length < 2 ? "" : isDifference() ? ", difference" : `, ${current().name}`;
  return `${now.name}${n > 1 ? `, ${matrixName(now.name, shape, now.head)}` : ""}${side}${what ? `: ${what}` : ""}`;
}

// A heat map of rows × cols numbers. words(row, col, x) says what a cell is; mark: the row that is chosen;
// cell: [row, col] of the chosen number; label: what the picture shows; pick(row, col), if there is one,
// chooses a cell, with a click or Enter.
export function heat(data, rows, cols, {range, words, mark, cell, label, pick, ...how}) {
  const layout = heatLayout(rows, cols, how, (...most) => binned(data, rows, cols, ...most));
  const {bins, left, top, cellX, cellY, wide, high, eachY} = layout;
  const [canvas, pen] = canvasOf(Math.ceil(left + wide), Math.ceil(top + high) + 2);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(image(data, bins, range), left, top, wide, high);
  pen.strokeStyle = css("--line");
  pen.strokeRect(left - .5, top - .5, wide + 1, high + 1);
  pen.fillStyle = css("--faint");
  if (how.rowName) rowNames(pen, rows, how.rowName, layout);
  colNames(pen, cols, how.colName, how.firstColumn ?? 0, layout);
  if (mark >= 0 && mark < rows) {
    pen.strokeStyle = css("--mark");
    pen.strokeRect(left - 1, top + mark * eachY - .5, wide + 2, Math.max(2, eachY) + 1);
  }
  if (cell) {
    pen.strokeStyle = css("--ink");
    pen.lineWidth = 2;
    pen.strokeRect(left + cell[1] * layout.eachX - 1, top + cell[0] * eachY - 1,
      Math.max(4, layout.eachX) + 2, Math.max(4, eachY) + 2);
  }
  canvas.cellAt = (x, y, nearest) => {  // row and column there; null beside the map
    const zoom = parseFloat(canvas.style.width) / canvas.clientWidth;
    const cell = [Math.floor((y * zoom - top) / eachY), Math.floor((x * zoom - left) / layout.eachX)];
    const inside = [rows, cols].map((n, k) => Math.max(0, Math.min(n - 1, cell[k])));
    return nearest || `${inside}` === `${cell}` ? inside : null;
  };
  let pointed = null;  // row and column of the number that is read out
  pointAt(canvas, (x, y) => {
    const i = Math.floor((y - top) / cellY), j = Math.floor((x - left) / cellX);
    pointed = null;
    if (i < 0 || j < 0 || i >= bins.R || j >= bins.C) return;
    const at = bins.pick[i * bins.C + j];
    pointed = [Math.floor(at / cols), at % cols];
    readout(words(...pointed, data[at]));
  });
  const size = `${range.signed ? "±" : "0 … "}${show(range.most)}`;
  walkable(canvas, {label: label ?? nameOfPicture(`${rows} rows × ${cols} columns of numbers, ${size}`), rows, cols, pick,
    boxOf: (i, j) => [left + j * layout.eachX, top + i * eachY, layout.eachX, eachY],
    tell: (i, j) => words(i, j, data[i * cols + j])});
  if (pick) canvas.addEventListener("click", () => { if (pointed) pick(...pointed); });
  return canvas;
}

export function bars(rows) {  // a table of [name, size, text]; name and text may be elements
  const most = Math.max(...rows.map(([, size]) => Math.abs(size)), 1e-30), table = element("table");
  for (const [name, size, text] of rows) {
    const bar = element("div");
    Object.assign(bar.style, {width: `${Math.abs(size) / most * 180}px`, height: "11px",
      background: rgb(size < 0 ? -1 : 1, {signed: true, most: 1})});
    const cells = [name, text, bar].map(what => element("td", {}, what));
    table.append(element("tr", {}, ...cells));
  }
  return element("div", {className: "wide"}, table);
}

// n small pictures to choose from, one after the other: draw(i) gives a canvas, pick(i) chooses. Those of before
// stay until there is a new one in their place. of: what they are of; if it is the same, none is drawn again.
const MOST_THUMBS = 256;
export async function thumbnails({n, chosen, label, draw, pick, still, of = ""}) {
  const place = $("thumbs"), count = Math.min(n, MOST_THUMBS), same = of !== "" && place.dataset.of === of;
  place.dataset.name = `${now.name} ${now.side}`;
  const mark = () => [...place.children].forEach((button, i) => button.setAttribute("aria-pressed", i === chosen));
  mark();
  if (same && place.children.length === count) {
    [...place.children].forEach((button, i) => { button.onclick = () => pick(i); });
    return;
  }
  place.dataset.of = "";
  let breath = performance.now();
  for (let i = 0; i < count; i++) {
    const canvas = await draw(i);
    if (!still()) return;
    canvas.ariaHidden = true;  // the button says what it is
    const button = place.children[i] ?? element("button");
    button.replaceChildren(canvas, `${i}`);
    Object.assign(button, {ariaLabel: label(i), title: label(i), onclick: () => pick(i)});
    if (!button.isConnected) place.append(button);
    button.setAttribute("aria-pressed", i === chosen);
    if (performance.now() - breath < 30) continue;
    await new Promise(done => setTimeout(done));
    if (!still()) return;
    breath = performance.now();
  }
  while (place.children.length > count) place.lastChild.remove();
  place.dataset.of = of;
}
