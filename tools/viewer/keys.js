// What the keys do.

import {$} from "./dom.js";
import {findInList} from "./list.js";
import {LENS, inLayer, isPaired, layerOf, matricesOf} from "./model.js";
import {choose, chooseLayer, infoOf, layersHere, now, tokenIds} from "./state.js";

const around = (x, by, n) => ((x + by) % n + n) % n;

function stepTensor(by) {
  const i = now.names.indexOf(now.name) + by;
  return {name: now.names[Math.max(0, Math.min(i, now.names.length - 1))]};
}
function stepLayer(by) {
  const here = layersHere(), before = by > 0 ? -1 : here.length;
  const next = (inLayer(now.name) ? here.indexOf(layerOf(now.name)) : before) + by;
  if (next in here) chooseLayer(here[next]);
}
function stepHead(by) {
  const n = now.name === LENS ? 1 : matricesOf(now.name, infoOf(now.name).shape).n;
  return n > 1 && {head: around(now.head, by, n)};
}
function stepPair(by) {
  const shape = infoOf(now.name)?.shape ?? [];
  return isPaired(now.name, shape) && {pair: around(now.pair, by, shape.at(-1) / 2)};
}
const stepToken = by => ({token: around(now.token, by, tokenIds().length || 1)});
const stepSide = by => now.traces.length > 1 && {side: around(now.side, by, 3)};

const KEYS = {  // what is chosen next, or nothing
  ArrowDown: () => stepTensor(1), ArrowUp: () => stepTensor(-1),
  "]": () => stepLayer(1), "[": () => stepLayer(-1),
  ArrowRight: () => stepHead(1), ArrowLeft: () => stepHead(-1),
  ".": () => stepPair(1), ",": () => stepPair(-1),
  t: () => stepToken(1), T: () => stepToken(-1),
  x: () => stepSide(1),
  "/": () => findInList(),
  "?": () => $("keys").showModal(),
};

export function followKeys() {
  $("help").onclick = () => $("keys").showModal();
  addEventListener("keydown", event => {
    const elsewhere = event.ctrlKey || event.metaKey || event.altKey || $("keys").open
      || ["SELECT", "INPUT"].includes(event.target.tagName);
    if (!now.names.length || elsewhere || !(event.key in KEYS)) return;
    event.preventDefault();
    const change = KEYS[event.key]();
    if (change) choose(change, {replace: event.repeat});
  });
}
