// Numbers as colours.

import {element, show} from "./dom.js";

export const dark = matchMedia("(prefers-color-scheme: dark)");
const RAMPS = {  // from the least to the most; for signed numbers with zero in the middle
  light: {one: [[255, 255, 255], [158, 202, 225], [8, 69, 148]],
          two: [[33, 102, 172], [250, 250, 250], [178, 24, 43]]},
  dark: {one: [[21, 24, 29], [33, 102, 172], [222, 238, 255]],
         two: [[96, 165, 250], [24, 27, 33], [255, 128, 110]]}};
const NAN = [255, 0, 220], MASKED = {light: [201, 206, 212], dark: [61, 68, 77]};
const theme = () => dark.matches ? "dark" : "light";

// A range: {signed, most}. Signed numbers are coloured by the root of their size, others by their size.
export function rangeOf(data, signed) {
  let most = 0;
  for (const x of data) if (Number.isFinite(x) && Math.abs(x) > most) most = Math.abs(x);
  return {signed, most: signed ? most || 1 : Math.max(most, 1e-30)};
}

export function colour(x, range) {  // red, green and blue
  if (Number.isNaN(x)) return NAN;
  if (x === -Infinity) return MASKED[theme()];
  const part = Math.min(1, Math.abs(x) / range.most);
  const t = range.signed ? (1 + Math.sign(x) * Math.sqrt(part)) / 2 : Math.min(1, x / range.most);
  const ramp = RAMPS[theme()][range.signed ? "two" : "one"];
  const [a, b, u] = t < .5 ? [ramp[0], ramp[1], 2 * t] : [ramp[1], ramp[2], 2 * t - 1];
  return a.map((from, i) => from + (b[i] - from) * Math.max(0, Math.min(1, u)));
}
export const rgb = (x, range) => `rgb(${colour(x, range).map(Math.round)})`;

const LEVELS = 2048, palettes = new Map();
function levels(signed) {  // of a range up to 1, each as the four bytes of a pixel
  const pack = x => colour(x, {signed, most: 1}).reduce((all, part, i) => all | Math.round(part) << 8 * i, 255 << 24) >>> 0;
  return {level: Uint32Array.from({length: 2 * LEVELS + 1}, (_, i) => pack(i / LEVELS - 1)),
          nan: pack(NaN), masked: pack(-Infinity)};
}
export function paletteOf({signed, most}) {  // colour() for many numbers
  const key = `${theme()} ${Boolean(signed)}`;
  if (!palettes.has(key)) palettes.set(key, levels(signed));
  const {level, nan, masked} = palettes.get(key);
  return x => x !== x ? nan : x === -Infinity ? masked
    : level[LEVELS + Math.round(Math.max(-1, Math.min(1, x / most)) * LEVELS)];
}

export function inkOn(x, range) {  // black or white, whichever is read better on a colour
  const [r, g, b] = colour(x, range).map(part => (part / 255) ** 2.2);
  return .2126 * r + .7152 * g + .0722 * b > .18 ? "#000" : "#fff";
}

export function legend(range, words = "") {
  const stops = Array.from({length: 9}, (_, i) => {
    const t = i / 4 - 1;
    return rgb(range.signed ? t * Math.abs(t) * range.most : i / 8 * range.most, range);
  });
  const bar = element("i");
  bar.style.background = `linear-gradient(90deg, ${stops})`;
  const all = [range.signed ? "colour by the root of the size" : "", words].filter(Boolean).join(" · ");
  return element("div", {className: "legend"}, range.signed ? show(-range.most) : "0", bar,
    show(range.most), element("span", {}, all));
}
