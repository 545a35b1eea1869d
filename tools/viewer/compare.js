// Two traces: what is compared, which tensor differs first, and where.

import {counted, stats, stopCounting} from "./counting.js";
import {$, element, show} from "./dom.js";
import {LENS, dimsOf, matricesOf} from "./model.js";
import {choose, isDifference, now, quoted, watchChoice} from "./state.js";

const HALVES = 3e-2, FULL = 1e-5;  // what 16 bits round, all later tensors inherit
const inHalves = () => now.traces.some(({halves}) => halves);
const measured = () => now.traces[now.reference].bounds;  // by tools/compare.py, for each tensor
const tolerance = name => measured()[name] ?? (inHalves() ? HALVES : FULL);

export function differs(name, found = stats.get(name)) {  // found: of statistics()
  const error = found?.error;
  return typeof error === "string" ? error === "other shape" : error > (found?.ids ? 0 : tolerance(name));
}

export function errorText({error, ids}) {
  if (typeof error === "string") return error;
  if (!ids) return `error ${show(error)}`;
  if (!ids.count) return "the same ids";
  const [a, b] = ids.numbers.map((id, side) => id === undefined ? "nothing" : `#${id} ${quoted(id, now.traces[side])}`);
  return `${ids.count} of ${ids.of} ids differ, first at position ${ids.first}: ${a}, ${b}`;
}

// ---------------------------------------------------------------------------------------- where

const WORDS = {B: "row", H: "head", K: "key/value head", T: "position", S: "key", E: "dim", D: "dim", F: "unit",
  V: "token id"};

// Of a number of a tensor that both have: matrix, row, column, and words for the place.
export function placeAt(name, at) {
  const [{shape}] = now.both.tensors.get(name), letters = dimsOf(name).split(" "), words = [];
  const {rows, cols} = matricesOf(name, shape), matrix = Math.floor(at / (rows * cols));
  const row = Math.floor(at / cols) % rows, position = rows === 1 ? now.both.common - 1 : row;
  let rest = at;
  [...shape.keys()].reverse().forEach(n => {
    const index = rest % shape[n], letter = letters.length === shape.length ? letters[n] : "";
    rest = Math.floor(rest / shape[n]);
    if (letter === "B" && shape[n] === 1) return;
    words.unshift(letter ? `${WORDS[letter]} ${letter === "T" ? position : index}` : `index ${index}`);
  });
  return {matrix, row, col: at % cols, position, words: words.join(", ")};
}

export function whereText(name, {apart}) {  // "" where nothing differs
  if (!apart?.most) return "";
  return `largest at ${placeAt(name, apart.at).words}: ${apart.numbers.map(show).join(" against ")}`;
}

export function jumpTo(name, at, side = 2) {  // to a number, in the difference
  const {matrix, row, col, position} = placeAt(name, at);
  return choose({name, head: matrix, token: position, pair: Math.floor(col / 2), cell: [row, col], side});
}

// ---------------------------------------------------------------------------------------- in sight at once

// Of all that are counted: the first that differs; and is one before it still to be counted?
function firstThatDiffers() {
  const names = now.names.filter(name => name !== LENS && (name !== "tokens" || now.both.sameText));
  const first = names.find(name => differs(name));
  const sooner = names.find(name => !stats.has(name));
  const sure = first && (!sooner || names.indexOf(first) < names.indexOf(sooner));
  return {first: sure ? first : null, sooner};
}

export function firstElement() {
  const stop = element("button", {id: "stop", onclick: () => stopCounting(!counted().stopped)});
  const bar = element("progress", {max: 1, value: 0, ariaLabel: "numbers compared"});
  return element("div", {id: "first"}, element("span", {}, "Comparing …"), element("div", {}, bar, " ", stop));
}

const comparable = () => [...now.both.tensors.keys()].some(name => name !== "tokens");
let said = "";
export function tellFirst() {
  if (!$("first") || now.traces.length < 2) return;
  const {first, sooner} = firstThatDiffers(), {read, all, stopped} = counted();
  const [words, progress] = $("first").children, [bar, stop] = progress.children;
  const over = ![...now.names].some(name => name !== LENS && !stats.has(name));
  progress.hidden = over;
  bar.value = all ? read / all : 0;
  stop.textContent = stopped ? "Go on" : "Stop";
  const key = `${first} ${sooner === undefined} ${stopped}`;
  if (said === key && words.dataset.said) return;
  said = key;
  words.dataset.said = "yes";
  if (!first) {
    words.textContent = sooner ? stopped ? "Stopped; so far nothing differs." : "Comparing …"
      : comparable() ? "The two agree in all they share." : "Nothing in the two can be compared.";
    return;
  }
  const found = stats.get(first), where = whereText(first, found);
  const button = element("button", {onclick: () => found.apart ? jumpTo(first, found.apart.at) : choose({name: first})}, first);
  words.replaceChildren("First that differs: ", button, where ? ` ${where}; ` : " ",
    found.ids ? errorText(found) : `relative error ${typeof found.error === "string" ? found.error : show(found.error)}`);
}

function leaving() {  // where the ids part; "" where one prompt just goes on
  const {both: {common}, traces} = now, ids = traces.map(({rows}) => rows[0][common]);
  if (ids.includes(undefined)) return "";
  return `Position ${common} is ${ids.map((id, side) => `#${id} ${quoted(id, traces[side])}`).join(" and ")}. `;
}

// Prompts of other lengths or texts: what is compared is said.
export function tellCompared() {
  const words = [], {both, traces} = now;
  if (both && !both.sameText) {
    const [a, b] = both.lengths.map((length, side) => `${traces[side].name} has ${length} tokens`);
    words.push(both.common ? `The prompts are not the same (${a}, ${b}): the first ${both.common} positions are compared, `
      + `which have the same tokens before them. ${leaving()}The last tokens stand side by side below each picture.`
      : `The prompts have no beginning in common (${a}, ${b}): their numbers cannot be compared. The last tokens `
      + "stand side by side below each picture.");
  }
  if (both && inHalves()) words.push(Object.keys(measured()).length
    ? "In 16 bits, only what differs by more than tools/compare.py measured that rounding may is named."
    : `In 16 bits, differences below ${HALVES} may be rounding and are not named; tools/compare.py measures, for each `
      + "tensor, how much may be.");
  $("compared").hidden = !words.length;
  $("compared").textContent = words.join(" ");
}

export function offerSides() {
  const words = [...now.traces.map(trace => trace.name), "first − second"];
  $("side").hidden = now.traces.length < 2;
  $("side").replaceChildren(...words.map((text, side) => new Option(text, side)));
}
export const sideName = () => isDifference() ? "difference" : now.traces[now.side]?.name ?? "";
export function followSide() {
  let pointed = false;  // who chose with the mouse goes on with the page's keys
  $("side").onpointerdown = () => { pointed = true; };
  $("side").onkeydown = () => { pointed = false; };
  $("side").onchange = event => {
    choose({side: +event.target.value});
    if (pointed) event.target.blur();
  };
  watchChoice(() => {
    $("side").value = now.side;
    document.title = `${now.name}${now.traces.length > 1 ? `, ${sideName()}` : ""} · Llama 3, tensor by tensor`;
  });
}
