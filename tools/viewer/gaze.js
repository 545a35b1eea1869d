// Attention on the text itself: the tokens that a token looks at are lit by their weight.

import {dark, inkOn, rgb} from "./colors.js";
import {css, element, readout, show} from "./dom.js";
import {matricesOf} from "./model.js";
import {choose, infoOf, isDifference, isHere, now, tokenIds, tokenName, tokenText, values} from "./state.js";

const MOST = 2000, ARCS = 12, ALL_ARCS = 400, LEAST = .04, MOST_NUMBERED = 96, SVG = "http://www.w3.org/2000/svg";
// How it is shown, as long as the page is open.
const how = {from: true, first: true, arcs: "token", colours: false};

function softmaxed(data, cols) {  // of each row
  const probs = new Float32Array(data.length);
  for (let row = 0; row < data.length; row += cols) {
    let most = -Infinity, sum = 0;
    for (let j = 0; j < cols; j++) most = Math.max(most, data[row + j]);
    for (let j = 0; j < cols; j++) sum += probs[row + j] = Math.exp(data[row + j] - most);
    for (let j = 0; j < cols; j++) probs[row + j] /= sum;
  }
  return probs;
}

function weightsFrom(name) {  // of(head): the weights of one head, T × S
  const probs = name.replace(/scores$/, "probs"), there = isHere(probs), held = new Map();
  const {size, cols} = matricesOf(name, infoOf(name).shape);
  if (!there && isDifference()) return null;
  return head => {
    if (!held.has(head)) held.set(head, values(there ? probs : name, head * size, size)
      .then(data => there ? data : softmaxed(data, cols)));
    return held.get(head);
  };
}

const hue = i => (215 + 137 * i) % 360;
const tint = (i, part) => `hsl(${hue(i)} 75% ${dark.matches ? "45%" : "60%"} / ${Math.min(1, part) * .85})`;
export const letters = i => tokenText(i).replaceAll("\n", "⏎").replaceAll("\t", "⇥");

// The weights between token `at` and every token, for each of the heads.
function between(matrices, at, {rows, cols}) {
  return matrices.map(data => Float32Array.from({length: cols}, (_, j) =>
    how.from ? data[at * cols + j] : j < rows ? data[j * cols + at] : 0));
}
const mean = (lists, j) => lists.reduce((sum, list) => sum + list[j], 0) / lists.length;
const counts = j => how.first || j > 0;

function told(at, weights, heads) {
  const order = [...weights.keys()].filter(counts).sort((a, b) => Math.abs(weights[b]) - Math.abs(weights[a]));
  const most = order.slice(0, 5).filter(j => weights[j]).map(j => `${tokenName(j)} ${show(weights[j])}`).join(", ");
  const who = heads.length > 1 ? `mean of heads ${heads.join(", ")}` : `head ${heads[0]}`;
  return how.from ? `${tokenName(at)} looks at ${most} (${who})`
    : `${tokenName(at)} is looked at by ${most || "none"} (${who})`;
}

function arcPath(a, b) {  // from the top of one box to that of another
  const rise = Math.min(28, 10 + Math.abs(a.x - b.x) / 10);  // as much as there is room above the first line
  return `M${a.x} ${a.y} C${a.x} ${a.y - rise} ${b.x} ${b.y - rise} ${b.x} ${b.y}`;
}
function drawArcs(svg, tokens, arcs) {
  const place = i => ({x: tokens[i].offsetLeft + tokens[i].offsetWidth / 2, y: tokens[i].offsetTop});
  svg.replaceChildren(...arcs.filter(([i, j]) => i !== j && tokens[i] && tokens[j]).map(([i, j, part, ink]) => {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("d", arcPath(place(i), place(j)));
    path.style.stroke = ink;
    path.style.strokeWidth = .6 + 4 * Math.min(1, part);
    path.style.opacity = .25 + .6 * Math.min(1, part);
    return path;
  }));
}
const strongest = (arcs, n) => arcs.filter(([, , part]) => part > LEAST).sort((a, b) => b[2] - a[2]).slice(0, n);

function arcsOf(at, lists, matrices, most, layout) {
  const ink = h => how.colours && lists.length > 1 ? `hsl(${hue(h)} 70% 50%)` : css("--mark");
  if (how.arcs === "token") return lists.flatMap((list, h) => strongest(
    [...list.keys()].filter(counts).map(j => [at, j, Math.abs(list[j]) / most, ink(h)]), ARCS));
  const all = [];
  matrices.forEach((data, h) => {
    for (let i = 0; i < layout.rows; i++) for (let j = 0; j <= i; j++)
      if (counts(j) && Math.abs(data[i * layout.cols + j]) > LEAST)
        all.push([i, j, Math.abs(data[i * layout.cols + j]), ink(h)]);
  });
  return strongest(all, ALL_ARCS);
}

function lit(token, weights, part, range) {  // the colours of one token
  if (how.colours && part.length > 1) {
    const bands = part.map((p, h) => `${tint(h, p)} ${100 * h / part.length}% ${100 * (h + 1) / part.length}%`);
    token.style.background = `linear-gradient(90deg, ${bands})`;
    token.style.color = "";
  } else {
    token.style.background = rgb(weights, range);
    token.style.color = inkOn(weights, range);
  }
}

function option(words, value, change) {
  const box = element("input", {type: "checkbox", checked: value, onchange: () => change(box.checked)});
  return element("label", {}, box, ` ${words}`);
}
function select(label, pairs, value, change) {
  const made = element("select", {ariaLabel: label, onchange: () => change(made.value)},
    ...pairs.map(([key, words]) => new Option(words, key)));
  made.value = value;
  return made;
}

function overlay(heads, chosen) {  // which heads are lit together
  const row = now.head - now.head % heads, buttons = Array.from({length: heads}, (_, h) => {
    const on = chosen.includes(row + h), button = element("button", {
      onclick: () => choose({overlay: on ? chosen.filter(x => x !== row + h) : [...chosen, row + h].sort((a, b) => a - b)})},
    `${h}`);
    button.setAttribute("aria-pressed", on);
    button.dataset.overlay = h;
    return button;
  });
  const colour = () => buttons.forEach((button, h) => {
    const at = how.colours && chosen.length > 1 ? chosen.indexOf(row + h) : -1;
    button.style.background = at < 0 ? "" : tint(at, .7);
  });
  colour();
  const all = element("button", {onclick: () => choose({overlay: buttons.map((_, h) => row + h)})}, "all");
  const alone = element("button", {onclick: () => choose({overlay: []})}, "one");
  const place = element("details", {open: now.overlay.length > 0},
    element("summary", {}, chosen.length > 1 ? `heads together: ${chosen.length}` : "several heads together"),
    element("div", {className: "choices", role: "group", ariaLabel: "heads that are lit together"}, ...buttons, all, alone));
  return {place, colour};
}

// The text with what its chosen token looks at. null: there are no weights.
export async function gaze({name, layout, still}) {
  const weightsOf = weightsFrom(name), ids = tokenIds(), {rows, cols} = layout, many = layout.perHead ? layout.heads : layout.n;
  if (!weightsOf || !ids.length || rows !== ids.length) return null;
  const chosen = now.overlay.length ? now.overlay : [now.head];
  const matrices = await Promise.all(chosen.map(weightsOf));
  if (!still()) return null;
  const names = chosen.map(head => head % many), svg = document.createElementNS(SVG, "svg");
  const tokens = ids.slice(0, MOST).map((_, i) => {
    const number = element("small"), token = element("button", {}, element("span", {}, letters(i)));
    if (ids.length <= MOST_NUMBERED) token.append(number);
    token.dataset.at = i;
    return token;
  });
  function paint(at) {
    const lists = between(matrices, at, layout), weights = Float32Array.from(lists[0], (_, j) => mean(lists, j));
    const most = Math.max(1e-30, ...lists.flatMap(list => [...list].filter((x, j) => counts(j)).map(Math.abs)));
    const meanMost = Math.max(1e-30, ...[...weights].filter((x, j) => counts(j)).map(Math.abs));
    const range = {signed: isDifference(), most: meanMost};
    tokens.forEach((token, j) => {
      const x = counts(j) ? weights[j] ?? 0 : 0;
      lit(token, x, lists.map(list => counts(j) ? Math.abs(list[j]) / most : 0), range);
      token.setAttribute("aria-pressed", j === now.token);
      token.classList.toggle("asks", j === at);
      token.ariaLabel = `${tokenName(j)}, weight ${show(weights[j])}`;
      if (token.lastChild.tagName === "SMALL")
        token.lastChild.textContent = Math.abs(weights[j]) >= .005 ? `${Math.round(100 * weights[j])}` : "";
    });
    drawArcs(svg, tokens, how.arcs === "none" ? [] : arcsOf(at, lists, matrices, most, layout));
    return told(at, weights, names);
  }
  const text = element("div", {className: "gaze", role: "group", ariaLabel: "the text, lit by attention"}, ...tokens, svg);
  svg.setAttribute("aria-hidden", "true");
  const atOf = event => event.target.closest?.("[data-at]")?.dataset.at;
  text.onpointerover = text.onfocusin = event => {
    if (atOf(event) !== undefined) readout(paint(+atOf(event)));
  };
  text.onpointerleave = text.onfocusout = () => paint(now.token);
  text.onclick = event => {
    if (atOf(event) !== undefined) choose({token: +atOf(event)});
  };
  const focused = document.activeElement?.dataset?.at, heads = overlay(many, chosen);
  const set = change => {
    Object.assign(how, change);
    heads.colour();
    paint(now.token);
  };
  const place = element("div", {}, element("div", {className: "choices"},
    select("direction", [["from", "what the token looks at"], ["by", "what looks at the token"]],
      how.from ? "from" : "by", value => set({from: value === "from"})),
    select("arcs", [["token", "arcs of the token"], ["all", "arcs of all tokens"], ["none", "no arcs"]],
      how.arcs, arcs => set({arcs})),
    option("first token too", how.first, first => set({first})),
    chosen.length > 1 ? option("each head in its colour", how.colours, colours => set({colours})) : "",
    many > 1 ? heads.place : ""), text);
  return {place, shown() {  // arcs need the place of each token on the page
    paint(now.token);
    const token = tokens[now.token];
    if (token) text.scrollTop = Math.max(0, token.offsetTop - text.clientHeight / 2);
    if (focused !== undefined) tokens[focused]?.focus({preventScroll: true});
  }};
}
