// The pass as a drawing, made from the trace's own names and dims: one layer unrolled, the others as a strip.

import {$, element, say} from "./dom.js";
import {GLIMPSED, forget, glimpseKey, glimpseOf, unbusy} from "./glimpse.js";
import {SHORT, dimsElement, dimsText, dimsWithSizes, knownSizes, letterOf} from "./letters.js";
import {LENS, LETTERS, dimsOf, inLayer, inputsOf, layerOf, partOf} from "./model.js";
import {OPERATORS, TRUNK, layoutOf, lineOf} from "./places.js";
import {choose, chooseLayer, current, infoOf, isDifference, layers, layersOfModel, now, watchChoice} from "./state.js";

const SVG = "http://www.w3.org/2000/svg";
const NOTES = [  // what the two blocks of a layer are for
  ["Attention", "what should each token read from the ones before it?"],
  ["Feed-forward", "what does each token make of what it read?"],
];
let layer = 0;  // the one that is unrolled
let drawn = "";  // what the drawing is of
let seen = new Set();  // nodes in sight: only these are painted
const different = new Set();  // tensors in which two traces differ, as far as that is known
let watcher = null, turn = 0;
const room = () => [$("map").clientWidth, $("map").clientHeight];
const wanted = () => JSON.stringify([current().name, now.side, layer, room()]);
const touch = matchMedia("(max-width: 760px), (pointer: coarse)");

const measuring = document.createElement("canvas").getContext("2d");
function fitted(text, font, most, wide) {  // a font size in which a text has room
  measuring.font = `${most}px ${font}`;
  return Math.max(7, Math.min(most, Math.floor(10 * most * wide / measuring.measureText(text).width) / 10));
}

function labelOf(name) {  // within its block the short one, but "out" would be three
  const part = partOf(name);
  return part === "out" ? name : part.endsWith(".out") ? part : part.replace(/^(attention|feed_forward)\./, "");
}

function shownSizes() {  // of two prompts those positions are compared that both begin with
  const sizes = {...knownSizes(current()), L: layersOfModel()}, common = isDifference() && now.both.common;
  return common ? {...sizes, T: common, S: common} : sizes;
}

function nodeOf(name, {x, y, w, h, part}, sizes) {
  const here = now.names.includes(name), pairs = name === LENS ? [["L", sizes.L ?? "?"], ["T", sizes.T ?? "?"]]
    : dimsWithSizes(name, isDifference() && name === "tokens" ? undefined : infoOf(name)?.shape, sizes);
  const label = labelOf(name), dims = dimsElement(pairs), inner = w - 8;
  const title = `${name}  ${dimsText(pairs)}${here ? "" : "  (not in this trace)"}`;
  const node = element("button", {className: "node", title, ariaLabel: title, disabled: !here,
    onclick: () => choose({name})},
    element("span", {className: "label"}, label), element("span", {className: "glimpse"}), dims);
  node.dataset[here ? "tensor" : "missing"] = name;
  node.classList.toggle("differs", different.has(name));
  node.querySelector(".label").style.fontSize = `${fitted(label, "system-ui", 11.5, inner)}px`;
  dims.style.fontSize = `${fitted(dims.textContent.trim(), "ui-monospace, monospace", 10.5, inner)}px`;
  if (part === "attention.q" && sizes.G > 1)
    node.querySelector(".label").append(element("small", {}, " ", letterOf("G"), `${sizes.G} a group`));
  Object.assign(node.style, {left: `${x}px`, top: `${y}px`, width: `${w}px`, height: `${h}px`});
  return node;
}

const stripWide = () => room()[0] - 110;
function stripRows(many) {  // how many lines of layers there are; on small screens one that scrolls
  return touch.matches ? 1 : Math.min(3, Math.ceil(many * 27 / stripWide()));
}
function stripOf(many, {left, stripTop}) {
  const strip = element("div", {className: "strip", role: "group", ariaLabel: "layers"});
  for (let i = 0; i < many; i++) {
    const there = now.names.some(name => layerOf(name) === i);
    const button = element("button",
      {onclick: () => chooseLayer(i), ariaLabel: `layer ${i}`, disabled: !there}, `${i}`);
    button.setAttribute("aria-pressed", i === layer);
    strip.append(button);
  }
  const inside = element("div", {className: "layers"}, element("span", {}, "layer"), strip);
  Object.assign(inside.style, {top: `${stripTop}px`, left: `${left - 36}px`});
  return inside;
}

// What comes in from a layer that is not drawn comes through the strip: from above, or from the layer's end.
const standsFor = name => inLayer(name) ? "tok_embeddings" : `layers.${layer}.out`;

function linesOf(layout) {  // of all that are drawn: from, to, input (its true name), and how they run
  const {boxes} = layout, lines = [], all = [...new Set([...now.names, ...boxes.keys()])];
  for (const [name, box] of boxes) {
    const inputs = name === LENS ? [`layers.${layer}.out`] : inputsOf(name, all);
    for (const input of inputs) {
      const from = boxes.has(input) ? input : standsFor(name);
      if (from !== name) lines.push({from, to: name, input, ...lineOf(boxes.get(from), box, layout)});
    }
  }
  return lines;
}

function edgesOf(lines, {blocks}) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("aria-hidden", "true");
  for (const {x, y, w, h} of blocks) {
    const card = document.createElementNS(SVG, "rect");
    for (const [key, value] of Object.entries({x, y, width: w, height: h, rx: 9})) card.setAttribute(key, value);
    svg.append(card);
  }
  const add = (d, look, {from, input, to}) => {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("d", d);
    path.setAttribute("class", look);
    Object.assign(path.dataset, {from: input, to, drawn: from});
    svg.append(path);
  };
  const through = ({from, input}) => from === input ? "" : "through";  // other layers lie between
  for (const line of lines) if (line.stream) add(line.stream, `stream ${through(line)}`, line);
  for (const line of lines) if (line.kind === TRUNK) add(line.path, "stream", line);
  for (const line of lines)
    if (line.kind !== TRUNK) add(line.path, line.stream ? "" : through(line), line);
  return svg;
}

function operatorsOf(lines, {boxes, blocks, tight}) {
  const made = [];
  for (const [name, {part}] of boxes) {
    const line = lines.findLast(({to, at}) => to === name && at);
    if (!line || !OPERATORS[part]) continue;
    const [text, title] = OPERATORS[part], of = lines.filter(({to, at}) => to === name && at);
    const operator = element("span", {className: text.length === 1 ? "op sign" : tight ? "op tight" : "op", title});
    for (const piece of text.split(/(√E)/)) operator.append(...piece === "√E" ? ["√", letterOf("E")] : [piece]);
    const [x, y] = of.at(-1).at;
    operator.dataset.to = name;
    operator.classList.toggle("outside", !blocks.some(block =>
      x > block.x && x < block.x + block.w && y > block.y && y < block.y + block.h));
    Object.assign(operator.style, {left: `${x}px`, top: `${y}px`});
    made.push(operator);
  }
  return made;
}

function sizesLine(sizes) {
  const line = element("div", {className: "sizes"});
  for (const [letter, meaning] of Object.entries(LETTERS))
    if (sizes[letter]) line.append(element("span", {}, letterOf(letter), ` ${sizes[letter]}`,
      element("small", {title: meaning}, ` ${SHORT[letter]}`)));
  return line;
}

function focused() {  // what has the focus in the map, as a way to find it again once that is drawn anew
  const {dataset, parentElement, textContent} = document.activeElement ?? {};
  if (!parentElement?.closest("#map")) return () => null;
  const part = dataset.tensor && partOf(dataset.tensor), all = where => [...$("map").querySelectorAll(where)];
  return () => part ? all("[data-tensor]").find(node => partOf(node.dataset.tensor) === part)
    : all(".strip button").find(button => button.textContent === textContent);
}

function draw() {
  const known = now.names.some(name => name === LENS || dimsOf(name));
  $("map").hidden = !known;  // of a file of other things there is nothing to draw
  drawn = wanted();
  seen = new Set();
  watcher?.disconnect();
  if (!known) return;
  const sizes = shownSizes(), many = Math.max(1, layers(), sizes.L ?? 0), legend = sizesLine(sizes);
  const scrolled = $("map").scrollTop, again = focused();
  $("map").replaceChildren(legend);
  const [wide, high] = room(), stripHigh = touch.matches ? 46 : 26 * stripRows(many) + 2;
  const layout = layoutOf(layer, wide, high - legend.offsetHeight, stripHigh), lines = linesOf(layout);
  const notes = layout.notes.map(({x, y, w, h}, i) => {
    const note = element("p", {className: "note"}, element("b", {}, NOTES[i][0]), `: ${NOTES[i][1]}`);
    Object.assign(note.style, {left: `${x}px`, top: `${y}px`, width: `${w}px`, height: `${h}px`});
    return note;
  });
  const nodes = [...layout.boxes].map(([name, box]) => nodeOf(name, box, sizes));
  const pass = element("div", {className: "pass"}, edgesOf(lines, layout), ...notes, stripOf(many, layout),
    ...nodes, ...operatorsOf(lines, layout));
  Object.assign(pass.style, {width: `${wide}px`, height: `${layout.high}px`});
  $("map").append(pass);
  $("map").scrollTop = scrolled;
  again()?.focus({preventScroll: true});
  watcher = new IntersectionObserver(entries => {
    for (const {isIntersecting, target} of entries) seen[isIntersecting ? "add" : "delete"](target);
    paint(sizes.K);
  }, {root: $("map"), rootMargin: "60px"});
  for (const node of nodes) if (node.dataset.tensor) watcher.observe(node);
  const pressed = pass.querySelector(".strip [aria-pressed=true]"), strip = pass.querySelector(".strip");
  if (pressed) strip.scrollLeft = pressed.offsetLeft - strip.clientWidth / 2;
}

export function buildMap() {
  drawn = "";
  layer = Infinity;  // the last one, until one is chosen
  different.clear();
  forget();
}

export function markDifferent(name) {
  different.add(name);
  for (const node of $("map").querySelectorAll("[data-tensor]"))
    node.classList.toggle("differs", different.has(node.dataset.tensor));
}

// Small pictures of the nodes in sight, one after the other, once the large one is there.
async function paint(groups = knownSizes(current()).K) {
  const mine = ++turn, key = `${drawn} ${glimpseKey()}`;
  await new Promise(done => setTimeout(done));
  await unbusy();
  for (const node of [...$("map").querySelectorAll("[data-tensor]")].filter(node => seen.has(node))) {
    if (mine !== turn) return;
    if (node.dataset.painted === key) continue;
    const place = node.querySelector(".glimpse"), {tensor} = node.dataset;
    const size = {wide: place.clientWidth, high: place.clientHeight, groups: groups ?? 1, layer};
    try {
      const made = GLIMPSED(tensor) ? await glimpseOf(tensor, size) : "";
      if (mine !== turn) return;
      place.replaceChildren(made);
      node.dataset.painted = key;
    } catch (problem) { return mine === turn && say(problem); }
  }
}

function wayTo(name) {  // all that it is made of, as far as it is drawn
  const way = new Set([name]), lines = [...$("map").querySelectorAll("path")].map(path => path.dataset);
  for (let before = 0; before !== way.size;) {
    before = way.size;
    for (const {drawn: from, to} of lines) if (way.has(to)) way.add(from);
  }
  return way;
}

function mark(change) {
  const way = wayTo(now.name);
  for (const node of $("map").querySelectorAll("[data-tensor]")) {
    const chosen = node.dataset.tensor === now.name;
    node.setAttribute("aria-current", chosen);
    node.classList.toggle("way", way.has(node.dataset.tensor));
    if (chosen && "name" in change) intoSight(node);
  }
  for (const path of $("map").querySelectorAll("path")) {
    const {from, to} = path.dataset;
    path.classList.toggle("lit", [from, to].includes(now.name));
    path.classList.toggle("way", way.has(to));
  }
  for (const operator of $("map").querySelectorAll(".op"))
    operator.classList.toggle("way", way.has(operator.dataset.to));
}

function intoSight(node) {  // moves the map alone, not the page
  const map = $("map"), top = node.offsetTop + node.offsetParent.offsetTop, over = 40;
  const hidden = top - over < map.scrollTop || top + node.offsetHeight + over > map.scrollTop + map.clientHeight;
  if (hidden) map.scrollTop = top + node.offsetHeight / 2 - map.clientHeight / 2;
}

export function followInMap() {
  watchChoice(change => {
    layer = layerOf(now.name) ?? Math.min(layer, Math.max(0, layers() - 1));
    if (drawn !== wanted()) draw();
    mark(change);
    paint();
  });
}
