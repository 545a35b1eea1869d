// The list of all tensors, and what it says of each.

import {differs, errorText, tellFirst} from "./compare.js";
import {$, element, say, show} from "./dom.js";
import {markDifferent} from "./map.js";
import {LENS, dimsOf, layerOf, partOf} from "./model.js";
import {choose, infoOf, isDifference, now, watchChoice} from "./state.js";
import {statistics} from "./statistics.js";

const stats = new Map();  // by name, once they are known
let waiting = new Set(), counting = false;

async function countWaiting() {
  if (counting) return;
  counting = true;
  for (let name; [name] = waiting, name !== undefined;) {
    waiting.delete(name);
    const traces = now.traces;
    try {
      const found = await statistics(name);
      if (traces === now.traces) stats.set(name, found);
      if (traces === now.traces) tell(name);
    } catch (problem) { if (traces === now.traces) say(problem); }
    await new Promise(done => setTimeout(done));  // lets the page breathe
  }
  counting = false;
}

// The list stands behind a button; it opens by itself where two traces are compared.
const KEY = "llama3-viewer-list";
function remembered() {
  try { return localStorage.getItem(KEY) === "open"; } catch { return false; }  // it may be forbidden
}
export function openList(open = $("names").hidden) {
  $("names").hidden = !open;
  $("all").setAttribute("aria-expanded", open);
  document.querySelector("main").classList.toggle("listed", open);
  if (open) rowOf(now.name)?.scrollIntoView({block: "nearest"});
}
export function findInList() {
  openList(true);
  $("find").focus();
  $("find").select();
}
function filter() {
  const wanted = $("find").value.trim().toLowerCase();
  for (const row of $("list").querySelectorAll("[data-tensor]"))
    row.hidden = !row.dataset.tensor.toLowerCase().includes(wanted);
  for (const title of $("list").querySelectorAll("h3")) title.hidden = wanted !== "";
}

const rowOf = name => [...$("list").querySelectorAll("[data-tensor]")]
  .find(row => row.dataset.tensor === name);

function tell(name) {
  tellFirst(stats);
  if (differs(stats.get(name))) markDifferent(name);
  const line = rowOf(name)?.querySelector("small"), found = stats.get(name);
  if (!line || !found) return;
  line.replaceChildren();
  const side = isDifference() ? null : found.sides[now.side];
  const alarm = text => line.append(" ", element("span", {className: "alarm"}, text));
  if (found.error !== null && differs(found)) alarm(errorText(found));
  if (side?.nan) alarm(`${side.nan} NaN`);
  if (side?.inf) line.append(` ${side.inf} infinite `);
  if (side?.n) line.append(` ${show(side.low)} … ${show(side.high)}  mean ${show(side.mean)}  `
    + `sd ${show(side.deviation)}`);
  if (found.error !== null && !differs(found)) line.append(`  ${errorText(found)}`);
  line.title = line.textContent;
}

function rowFor(name) {
  const shape = infoOf(name)?.shape.join(" ");
  const row = element("button", {onclick: () => choose({name})}, layerOf(name) === undefined ? name : partOf(name),
    element("span", {}, `  ${dimsOf(name)}${shape ? `  (${shape})` : ""}`), element("small"));
  row.dataset.tensor = name;
  return row;
}

export function buildList() {
  stats.clear();
  waiting = new Set();
  const seen = new IntersectionObserver(entries => {
    for (const {isIntersecting, target: {dataset: {tensor}}} of entries)
      if (isIntersecting && !stats.has(tensor)) waiting.add(tensor);
    countWaiting();
  });
  const rows = [];
  let layer;
  for (const name of now.names) {
    if (layerOf(name) !== undefined && layerOf(name) !== layer) {
      layer = layerOf(name);
      rows.push(element("h3", {}, `layer ${layer}`));
    }
    const row = rowFor(name);
    if (name !== LENS) seen.observe(row);
    rows.push(row);
  }
  if (now.traces.length > 1) {  // all are compared, also those out of sight
    rows.unshift(element("div", {id: "first"}, "Comparing …"));
    for (const name of now.names) if (name !== LENS) waiting.add(name);
  }
  $("list").replaceChildren(...rows);
  openList(remembered() || now.traces.length > 1 || !now.names.some(name => dimsOf(name)));
  filter();
  countWaiting();
}

export function followInList() {
  $("find").oninput = filter;
  $("all").onclick = () => {
    openList();
    try { localStorage.setItem(KEY, $("names").hidden ? "closed" : "open"); } catch { /* then it is closed again */ }
    choose({}, {keep: true});  // drawn for the room there is now
  };
  watchChoice(change => {
    for (const row of $("list").querySelectorAll("[data-tensor]")) {
      const chosen = row.dataset.tensor === now.name;
      row.setAttribute("aria-current", chosen);
      if (chosen && "name" in change) row.scrollIntoView({block: "nearest"});
    }
    if ("side" in change) for (const name of stats.keys()) tell(name);
  });
}
