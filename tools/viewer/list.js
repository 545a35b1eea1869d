// The list of all tensors, and what it says of each.

import {differs, errorText, firstElement, tellFirst} from "./compare.js";
import {countSoon, startCounting, stats, watchCounts} from "./counting.js";
import {$, element, show} from "./dom.js";
import {markDifferent} from "./map.js";
import {LENS, dimsOf, layerOf, partOf} from "./model.js";
import {choose, infoOf, isDifference, now, watchChoice} from "./state.js";

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

const shapeText = name => {
  const shape = infoOf(name)?.shape.join(" ");
  return `  ${dimsOf(name)}${shape ? `  (${shape})` : ""}`;
};

function tell(name) {
  tellFirst();
  if (name === undefined) return;
  if (differs(name)) markDifferent(name);
  const row = rowOf(name), line = row?.querySelector("small"), found = stats.get(name);
  if (row) row.querySelector("span").textContent = shapeText(name);
  if (!line || !found) return;
  line.replaceChildren();
  const side = isDifference() ? null : found.sides[now.side];
  const alarm = text => line.append(" ", element("span", {className: "alarm"}, text));
  if (found.error !== null && differs(name)) alarm(errorText(found));
  if (side?.nan) alarm(`${side.nan} NaN`);
  if (side?.inf) line.append(` ${side.inf} infinite `);
  if (side?.n) line.append(` ${show(side.low)} … ${show(side.high)}  mean ${show(side.mean)}  `
    + `sd ${show(side.deviation)}`);
  if (found.error !== null && !differs(name)) line.append(`  ${errorText(found)}`);
  line.title = line.textContent;
}

function rowFor(name) {
  const row = element("button", {onclick: () => choose({name})}, layerOf(name) === undefined ? name : partOf(name),
    element("span", {}, shapeText(name)), element("small"));
  row.dataset.tensor = name;
  return row;
}

export function buildList() {
  const seen = new IntersectionObserver(entries => {
    for (const {isIntersecting, target: {dataset: {tensor}}} of entries)
      if (isIntersecting && rowOf(tensor)) countSoon(tensor);
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
  if (now.traces.length > 1) rows.unshift(firstElement());
  $("list").replaceChildren(...rows);
  openList(remembered() || now.traces.length > 1 || !now.names.some(name => dimsOf(name)));
  filter();
  startCounting();
}

export function followInList() {
  $("find").oninput = filter;
  $("all").onclick = () => {
    openList();
    try { localStorage.setItem(KEY, $("names").hidden ? "closed" : "open"); } catch { /* then it is closed again */ }
    choose({}, {keep: true});  // drawn for the room there is now
  };
  watchCounts(tell);
  watchChoice(change => {
    for (const row of $("list").querySelectorAll("[data-tensor]")) {
      const chosen = row.dataset.tensor === now.name;
      row.setAttribute("aria-current", chosen);
      if (chosen && "name" in change) row.scrollIntoView({block: "nearest"});
    }
    if ("side" in change) for (const name of now.names) tell(name);
  });
}
