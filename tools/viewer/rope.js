// Queries and keys before and after RoPE: each pair of dims is a point that turns with its position.

import {dark} from "./colors.js";
import {css, cut, element, readout, show} from "./dom.js";
import {isPaired, matrixName} from "./model.js";
import {canvasOf, nameOfPicture, pointAt, thumbnails} from "./picture.js";
import {read} from "./safetensors.js";
import {choose, infoOf, isDifference, isHere, now, pickCell, tokenName, values} from "./state.js";
import {walkable} from "./walking.js";

const MANY = 24, THUMB = 58;
const angle = ([x, y]) => Math.atan2(y, x);
const pointOf = (data, cols, pair, i) => [data[i * cols + 2 * pair], data[i * cols + 2 * pair + 1]];
const tone = (i, rows) =>
  `hsl(${230 - 230 * i / Math.max(1, rows - 1)} 75% ${dark.matches ? 65 : 42}%)`;

function farthest(points) {
  const sizes = points.flat().map(point => Math.hypot(...point)).filter(Number.isFinite);
  return sizes.reduce((a, b) => Math.max(a, b), 1e-30);
}

function axes(pen, side) {
  const middle = side / 2;
  pen.strokeStyle = css("--line");
  pen.strokeRect(.5, .5, side - 1, side - 1);
  pen.beginPath();
  pen.moveTo(0, middle);
  pen.lineTo(side, middle);
  pen.moveTo(middle, 0);
  pen.lineTo(middle, side);
  pen.stroke();
}
function arc(pen, middle, radius, from, to, weight) {  // the way a point turned
  pen.globalAlpha = weight;
  pen.beginPath();
  pen.arc(middle, middle, radius, -from, -to, true);
  pen.stroke();
  pen.globalAlpha = 1;
}
function dot(pen, [x, y], size, filled) {
  pen.beginPath();
  pen.arc(x, y, size, 0, 7);
  filled ? pen.fill() : pen.stroke();
}

// Names beside their points, the first ones of the list before the others, and none above another.
function labels(pen, side, named, points) {
  const taken = points.length > 2 * MANY ? [] : points.map(([x, y]) => [x - 5, y, 10, 10]);
  for (const {text, at: [x, y], strong} of named) {
    const wide = pen.measureText(text).width;
    const place = [[x + 8, y - 8], [x + 8, y + 8], [x - 8 - wide, y - 8], [x - 8 - wide, y + 8]].find(([u, v]) =>
      u > 1 && u + wide < side - 1 && v > 8 && v < side - 8
      && taken.every(([a, b, w, h]) => u > a + w + 2 || u + wide + 2 < a || Math.abs(v - b) > h));
    if (!place) continue;
    taken.push([...place, wide, 13]);
    pen.fillStyle = css(strong ? "--ink" : "--faint");
    pen.fillText(text, ...place);
  }
}

// One pair of dims. before, after: the numbers before and after RoPE, either may be null.
function circle({before, after, rows, cols, pair, side, large}) {
  const [canvas, pen] = canvasOf(side, side), middle = side / 2;
  const reach = middle - (large ? 42 : 4);
  const both = Array.from({length: rows}, (_, i) =>
    [before, after].map(data => data && pointOf(data, cols, pair, i)));
  const most = farthest(both.map(points => points.filter(Boolean)));
  const on = ([x, y]) => [middle + x / most * reach, middle - y / most * reach];
  axes(pen, side);
  const ends = [], many = rows > MANY, order = [...both.keys()].filter(i => i !== now.token);
  if (now.token < rows) order.push(now.token);  // the chosen one above the others
  for (const i of order) {
    const [from, to] = both[i], strong = large && i === now.token;
    const size = strong ? 6 : large ? many ? 3 : 4.5 : 1.7;
    pen.strokeStyle = pen.fillStyle = tone(i, rows);
    pen.lineWidth = strong ? 2.5 : 1;
    if (large && from && to && (!many || strong) && !isDifference())
      arc(pen, middle, Math.hypot(...to) / most * reach, angle(from), angle(to), strong ? .9 : .35);
    if (from && (large || !to) && !(many && to && !strong)) dot(pen, on(from), size, false);
    if (to) dot(pen, on(to), size, true);
    for (const point of [from, to]) if (point) ends.push({i, end: on(point)});
  }
  if (!large) return canvas;
  order.reverse();
  const far = i => i === now.token ? Infinity : Math.hypot(...both[i][1] ?? both[i][0]);
  if (many) order.sort((a, b) => far(b) - far(a));
  labels(pen, side, order.slice(0, MANY).map(i =>
    ({text: cut(tokenName(i), 10), at: on(both[i][1] ?? both[i][0]), strong: i === now.token})), ends.map(({end}) => end));
  let nearest = 0;
  pointAt(canvas, (x, y) => {
    const far = ({end}) => Math.hypot(end[0] - x, end[1] - y);
    nearest = ends.reduce((a, b) => far(b) < far(a) ? b : a).i;
    readout(wordsOf(nearest, ...both[nearest]));
  });
  const pick = i => pickCell(i, 2 * pair);
  canvas.addEventListener("click", () => pick(nearest));
  walkable(canvas, {label: nameOfPicture(`pair ${pair}, a point for each token`), rows, cols: 1, pick,
    tell: i => wordsOf(i, ...both[i]), boxOf: i => {
      const {end: [x, y]} = ends.findLast(one => one.i === i);
      return [x - 6, y - 6, 12, 12];
    }});
  return canvas;
}

function wordsOf(i, from, to) {
  const text = point => `(${point.map(show).join(", ")})`;
  const words = `${tokenName(i)} at ${i}: ${text(from ?? to)}`;
  if (!from || !to) return words;
  if (isDifference()) return `${words} against ${text(to)}, ${show(Math.hypot(to[0] - from[0], to[1] - from[1]))} apart`;
  const turned = (angle(to) - angle(from) + 4 * Math.PI) % (2 * Math.PI) * 180 / Math.PI;
  return `${words} turned by ${turned.toFixed(1)}° to ${text(to)}`;
}

export const ropePicture = {
  fits: ({name, shape}) => isPaired(name, shape),
  async draw({name, shape, layout, picture, still}) {
    const {rows, cols, size} = layout, count = cols / 2;
    now.pair = Math.min(now.pair, count - 1);
    const plain = name.replace("_rotated", "");
    const [before, after] = await Promise.all(isDifference()
      ? now.both.tensors.get(name).map((info, side) => read(now.traces[side], info, now.head * size, size))
      : [plain, `${plain}_rotated`].map(key =>
        isHere(key) && `${infoOf(key).shape}` === `${shape}` ? values(key, now.head * size, size) : null));
    if (!still()) return;
    const draw = (pair, side, large) => circle({before, after, rows, cols, pair, side, large});
    const side = Math.max(240, Math.min(460, picture.clientWidth - 4, innerHeight - 330));
    picture.replaceChildren(draw(now.pair, side, true), element("div", {className: "legend"},
      `pair ${now.pair}: dims ${2 * now.pair} and ${2 * now.pair + 1} of ${matrixName(name, shape, now.head)}. `
      + (isDifference() ? `Rings ${now.traces[0].name}, dots ${now.traces[1].name}. `
        : !before || !after ? "" : rows > MANY ? "Dots after RoPE; of the chosen token the ring before it and the way it turned. "
          : "Rings before RoPE, dots after, the arc is the turn. ")
      + "First tokens blue, last ones red; a click chooses one."));
    await thumbnails({n: count, chosen: now.pair, still, label: pair => `pair ${pair}`,
      draw: async pair => draw(pair, THUMB, false), pick: pair => choose({pair})});
  },
};
