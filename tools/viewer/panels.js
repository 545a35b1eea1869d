// What is shown of the chosen tensor: one picture, and below it every panel that has something to say.

import {attentionPicture} from "./attention.js";
import {lastPanel} from "./beside.js";
import {cellPanel} from "./cell.js";
import {contributionsPanel} from "./contributions.js";
import {$, element, readout, say} from "./dom.js";
import {guessPanel} from "./guess.js";
import {howRead} from "./layouts.js";
import {lensPicture} from "./lens.js";
import {dimsElement, dimsWithSizes} from "./letters.js";
import {linePanel} from "./line.js";
import {logitsPicture} from "./logits.js";
import {lookButtons} from "./looks.js";
import {meaningPanel} from "./meaning.js";
import {LENS, dimsOf, inLayer, isPaired, layerOf, matricesOf, matrixName} from "./model.js";
import {ropePicture} from "./rope.js";
import {choose, chooseLayer, current, groupSize, infoOf, isDifference, isHere, layersHere, layersOfModel, now, watchChoice} from "./state.js";
import {streamPicture} from "./stream.js";
import {matrixPicture, tokensPicture} from "./tensor.js";
import {toolsOf} from "./tools.js";
import {meetingPanel, speedPanel} from "./turning.js";
import {unitsPicture} from "./units.js";
import {wherePanel} from "./where.js";

// The first that fits is drawn: {fits(view), async draw(view)}. A view: name, info, shape, layout (of
// matricesOf), picture (the element to fill), still() (false once something else has been chosen).
const PICTURES = [
  lensPicture,
  tokensPicture,
  ropePicture,
  unitsPicture,
  logitsPicture,
  attentionPicture,
  streamPicture,
  matrixPicture,
];
// All that fit are drawn, each into an element of its own: {title, fits(view), async draw(view, element)}.
// always: also where there is no picture.
const PANELS = [
  cellPanel,
  guessPanel,
  wherePanel,
  lastPanel,
  meaningPanel,
  meetingPanel,
  speedPanel,
  contributionsPanel,
  linePanel,
];

const SOON = 500;  // milliseconds, before somebody has scrolled

function viewOf(still) {
  const info = now.name === LENS ? null : infoOf(now.name), shape = info?.shape ?? [];
  return {name: now.name, info, shape, layout: matricesOf(now.name, shape), picture: $("picture"), still};
}

function stepper(what, value, n, change, words = `${value} of ${n}`) {
  const button = (text, by) => element("button", {
    ariaLabel: `${by > 0 ? "next" : "previous"} ${what}`, disabled: n < 2,
    onclick: () => change((value + by + n) % n)}, text);
  return element("span", {}, button("‹", -1), ` ${what} ${words} `, button("›", 1));
}

function layerStepper(name) {  // through those that the trace has
  const here = layersHere(), layer = layerOf(name), all = layersOfModel();
  return stepper("layer", here.indexOf(layer), here.length, at => chooseLayer(here[at]), all ? `${layer} of ${all}` : `${layer}`);
}

function headStepper({name, shape, layout: {n, heads}}) {
  const what = n === heads ? "head" : heads > 1 ? `${matrixName(name, shape, now.head)},` : "row";
  return stepper(what, now.head, n, head => choose({head}));
}

function groupText({name, layout: {heads}}) {  // which query heads share which keys and values; "" where each has its own
  const G = groupSize(), letter = dimsOf(name).split(" ")[1], head = now.head % heads;
  if (G === 1 || !inLayer(name) || !"HK".includes(letter ?? "-")) return "";
  const group = letter === "H" ? Math.floor(head / G) : head;
  if (letter === "K") return `group ${group}: q heads ${group * G} to ${group * G + G - 1}, G = ${G}`;
  return `q head ${head}, of group ${group}: k head ${group}, G = ${G}`;
}

function controls(view) {
  const {name, info, shape, layout} = view, parts = [element("h2", {}, name)];
  if (info) parts.push(element("span", {}, dimsElement(dimsWithSizes(name, shape, {})), `  ${info.dtype}`));
  if (inLayer(name)) parts.push(layerStepper(name));
  if (layout.n > 1) parts.push(headStepper(view));
  const group = groupText(view);
  if (group) parts.push(element("span", {id: "group"}, group));
  if (isPaired(name, shape)) {
    const pairs = shape.at(-1) / 2;
    now.pair = Math.min(now.pair, pairs - 1);
    parts.push(stepper("pair", now.pair, pairs, pair => choose({pair})));
  }
  $("controls").replaceChildren(...parts, element("span", {id: "read"}), ...lookButtons(name));
}

function tellRead({name, info}) {  // what reading it has shown too: a mask of large numbers
  const infos = isDifference() ? now.both.tensors.get(name) ?? [] : [info];
  const words = infos.map((one, side) => [now.traces[infos.length > 1 ? side : now.side], one && howRead(name, one)])
    .filter(([, text]) => text).map(([trace, text]) => now.traces.length > 1 ? `${trace.name}: ${text}` : text);
  $("read").textContent = words.join("; ");
}

const WHY = {
  "only in one": "one has no such tensor", "other shape": "one has another shape",
  "no token in common": "the prompts have no beginning in common",
  "of other positions": "one has the last position only, and the prompts are not the same",
};
function missing({name, info}) {  // why there is no picture; "": there is one
  if (name === LENS) return "";
  if (!info.count) return "It is empty.";
  if (isHere(name)) return "";
  if (name === "tokens" && now.traces.every(({rows}) => rows[0].length)) return "";  // ids of both stand side by side
  return isDifference() ? `There is no difference to show: ${WHY[now.both.why.get(name)] ?? now.both.why.get(name)}.`
    : `${current().name} has no such tensor.`;
}

async function drawPanels(view, change, alone) {
  const places = [];
  for (const panel of PANELS) {
    if (!panel.fits(view) || (alone && !panel.always)) continue;
    const title = element("h3", {tabIndex: -1}, panel.title), inside = element("div");
    const place = element("div", {role: "region", ariaLabel: panel.title}, title, inside);
    await panel.draw(view, inside);
    places.push(place);
  }
  if (!view.still()) return;
  const focused = $("panels").contains(document.activeElement);
  $("panels").replaceChildren(...places);
  if (focused) places[0]?.firstChild.focus({preventScroll: true});  // what was clicked there is gone
  showCell(change);
}
function showCell(change) {
  if (now.cell && "cell" in change && !isDifference()) $("panels").firstChild?.scrollIntoView({block: "nearest"});
}

async function drawPicture(picture, view) {
  await picture.draw(view);
  if (view.still()) $("controls").append(toolsOf(view));
}

function clearThumbnails() {  // those of another tensor, where this one has none
  $("thumbs").replaceChildren();
  $("thumbs").dataset.of = "";
}

async function draw(change, still) {
  const view = viewOf(still);
  readout("");
  controls(view);
  const why = missing(view);
  const begun = performance.now(), picture = PICTURES.find(one => one.fits(view));
  if (why) view.picture.replaceChildren(why);
  const panels = drawPanels(view, change, why !== "");
  await Promise.all([why ? null : drawPicture(picture, view), panels]);  // heads' pictures may take a while
  if (!still()) return;
  tellRead(view);
  if ($("thumbs").dataset.name !== `${now.name} ${now.side}`) clearThumbnails();
  if (performance.now() - begun < SOON) showCell(change);  // the picture may have moved it
}

export function followInPanels() {
  watchChoice(async (change, still) => {
    $("picture").ariaBusy = true;
    try { await draw(change, still); } catch (problem) {
      if (still()) $("panels").replaceChildren();
      if (still()) say(problem);
    }
    if (still()) $("picture").ariaBusy = false;
  });
}
