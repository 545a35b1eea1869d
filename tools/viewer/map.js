// The pass as a drawing, made from the trace's own names and dims: one layer unrolled, the others as a strip.

import {$, element} from "./dom.js";
import {LENS, LETTERS, dimsOf, inLayer, inputsOf, layerOf, partOf, sizesOf} from "./model.js";
import {choose, chooseLayer, current, infoOf, layers, now, watchChoice} from "./state.js";

const WIDTH = 292, LANE = 284, NODE = 84, HIGH = 46, GAP = 14, ROW = HIGH + GAP, TURN = 6;
const SVG = "http://www.w3.org/2000/svg";
// Where each stands: row, and column of three. Rows are put together where a trace lacks one.
const START = {tokens: [0, 1], tok_embeddings: [1, 1]};
const PLACES = {
  attention_norm: [0, 1], "attention.q": [1, 0], "attention.k": [1, 1], "attention.v": [1, 2],
  "attention.q_rotated": [2, 0], "attention.k_rotated": [2, 1], "attention.scores": [3, .5],
  "attention.probs": [4, .5], "attention.heads": [5, 1], "attention.out": [6, 1], after_attention: [7, 1],
  ffn_norm: [8, 1], "feed_forward.gate": [9, .5], "feed_forward.up": [9, 1.5],
  "feed_forward.hidden": [10, 1], "feed_forward.out": [11, 1], out: [12, 1],
};
const END = {norm: [0, 1], logits: [1, .5], [LENS]: [1, 1.5]};

let layer = 0;  // the one that is unrolled
let drawn = "";  // what the drawing is of
const wanted = () => JSON.stringify([current().name, layer]);

function placed(places, nameOf, top) {  // [name, x, y] of those there are, and how far down they reach
  const there = Object.entries(places).filter(([part]) => now.names.includes(nameOf(part)));
  const rows = [...new Set(there.map(([, [row]]) => row))];
  const nodes = there.map(([part, [row, column]]) =>
    [nameOf(part), 4 + column * (NODE + 6), top + rows.indexOf(row) * ROW]);
  return {nodes, bottom: top + rows.length * ROW};
}

function nodeOf(name, x, y) {
  const {shape = []} = infoOf(name) ?? {}, dims = dimsOf(name);
  const text = partOf(name).replace(/^(attention|feed_forward)\./, "");
  const node = element("button", {className: "node", title: `${name}  ${dims}`, onclick: () => choose({name})},
    text, element("small", {}, dims), element("small", {}, shape.join("×")));
  node.dataset.tensor = name;
  Object.assign(node.style, {left: `${x}px`, top: `${y}px`, width: `${NODE}px`, height: `${HIGH}px`});
  return node;
}

function stripOf(top) {
  const strip = element("div", {className: "strip", role: "group", ariaLabel: "layers"}, "layer ");
  for (let i = 0; i < layers(); i++) {
    const button = element("button", {onclick: () => chooseLayer(i), ariaLabel: `layer ${i}`}, `${i}`);
    button.setAttribute("aria-pressed", i === layer);
    strip.append(button);
  }
  Object.assign(strip.style, {top: `${top}px`, width: "100%"});
  return strip;
}

function pathOf([x, y], [u, v]) {
  if (v - y <= 2 * ROW) {
    const [from, to] = [x + NODE / 2, u + NODE / 2];
    return `M${from} ${y + HIGH} C${from} ${y + HIGH + GAP} ${to} ${v - GAP} ${to} ${v}`;
  }
  const end = v + HIGH / 2 - 4;
  if (x > u) {  // straight down, then to the left
    const lane = x + NODE / 2;
    return `M${lane} ${y + HIGH} V${end - TURN} q0 ${TURN} ${-TURN} ${TURN} H${u + NODE}`;
  }
  const start = y + HIGH / 2 + 4;  // around what stands between, as the residual stream goes
  return `M${x + NODE} ${start} H${LANE - TURN} q${TURN} 0 ${TURN} ${TURN} V${end - TURN} `
    + `q0 ${TURN} ${-TURN} ${TURN} H${u + NODE}`;
}

// What comes in from a layer that is not drawn comes through the strip: from above, or from the layer's end.
const standsFor = name => inLayer(name) ? "tok_embeddings" : `layers.${layer}.out`;

function edgesOf(nodes) {
  const svg = document.createElementNS(SVG, "svg");
  const at = new Map(nodes.map(([name, x, y]) => [name, [x, y]]));
  svg.setAttribute("aria-hidden", "true");
  for (const [name, x, y] of nodes) for (const input of inputsOf(name, now.names)) {
    const from = at.get(input) ?? at.get(standsFor(name));
    if (!from) continue;
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("d", pathOf(from, [x, y]));
    Object.assign(path.dataset, {from: input, to: name});
    svg.append(path);
  }
  return svg;
}

function sizes() {
  const found = sizesOf(current()), line = element("div", {className: "sizes"});
  for (const [letter, meaning] of Object.entries(LETTERS))
    if (found[letter]) line.append(element("span", {title: meaning}, `${letter} ${found[letter]}`));
  return line;
}

function draw() {
  const start = placed(START, part => part, 4);
  const middle = placed(PLACES, part => `layers.${layer}.${part}`, start.bottom + (layers() ? 40 : 0));
  const end = placed(END, part => part, middle.bottom + 6);
  const nodes = [...start.nodes, ...middle.nodes, ...end.nodes];
  const pass = element("div", {className: "pass"}, edgesOf(nodes), ...nodes.map(node => nodeOf(...node)));
  if (layers()) pass.append(stripOf(start.bottom + 4));
  Object.assign(pass.style, {width: `${WIDTH}px`, height: `${end.bottom}px`});
  const scrolled = $("map").scrollTop;
  $("map").replaceChildren(sizes(), pass);
  $("map").scrollTop = scrolled;
  drawn = wanted();
}

export function buildMap() {
  drawn = "";
}

function mark(change) {
  for (const node of $("map").querySelectorAll("[data-tensor]")) {
    const chosen = node.dataset.tensor === now.name;
    node.setAttribute("aria-current", chosen);
    if (chosen && "name" in change) node.scrollIntoView({block: "nearest"});
  }
  for (const path of $("map").querySelectorAll("path"))
    path.classList.toggle("lit", [path.dataset.from, path.dataset.to].includes(now.name));
}

export function followInMap() {
  watchChoice(change => {
    layer = layerOf(now.name) ?? Math.min(layer, Math.max(0, layers() - 1));
    if (drawn !== wanted()) draw();
    mark(change);
  });
}
