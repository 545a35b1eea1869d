// Opening traces: chosen, dropped, named in the address, or inside this page.

import {broughtAlong} from "./address.js";
import {offerSides, tellCompared} from "./compare.js";
import {$, say} from "./dom.js";
import {offerHint} from "./hint.js";
import {buildList} from "./list.js";
import {buildMap} from "./map.js";
import {arrange} from "./layouts.js";
import {LENS, inOrder, isLens, partOf} from "./model.js";
import {openTrace} from "./safetensors.js";
import {choose, now, setTraces} from "./state.js";

let begun = 0, shown = 0;  // openings: of two at once the later one stays

function namesOf(traces) {
  const all = traces.flatMap(trace => [...trace.tensors.keys()]);
  const names = new Set(all.filter(name => !isLens(name)));
  if (all.includes("lens.ids")) names.add(LENS);
  return inOrder([...names]);
}

function filesText(trace) {
  const size = `${(trace.blob.size / 1e6).toFixed(1)} MB`;
  return `${trace.name} (${size}${trace.about.dtype ? `, ${trace.about.dtype}` : ""})`;
}

function leftOut() {
  const words = now.traces.filter(trace => trace.about.left_out).map(trace =>
    `To keep this page small, ${trace.name} goes without ${trace.about.left_out}; --save-trace writes all.`);
  $("left_out").hidden = !words.length;
  $("left_out").textContent = words.join(" ");
}

function firstLook() {  // who attends to whom in the last layer, if it is there
  const worth = now.names.findLast(name => partOf(name) === "attention.probs");
  return worth ?? [LENS, "logits"].find(name => now.names.includes(name)) ?? now.names[0];
}

function show(traces, reference, origin) {
  say(null);
  setTraces(traces, reference);
  Object.assign(now, {origin, names: namesOf(traces), side: 0, row: 0});
  now.token = Math.max(0, traces[0].rows[0].length - 1);
  if (!now.names.includes(now.name)) now.name = firstLook();
  $("files").textContent = traces.map(filesText).join("  against  ");
  document.querySelector("main").hidden = false;
  leftOut();
  offerSides();
  tellCompared();
  $("thumbs").dataset.of = "";  // another file may have the same name
  offerHint();
  buildMap();
  buildList();
  choose({name: now.name, ...broughtAlong()}, {opened: true});
}

// parts: [blob, name] of one or two. One more beside a single one: the two are compared.
export async function open(parts, origin = "file") {
  const mine = ++begun;
  try {
    if (parts.length > 2) throw new Error("Two traces at most can be looked at together.");
    const traces = [];
    for (const [blob, name] of parts) traces.push(await openTrace(blob, name));
    if (!traces.length || mine < shown) return;
    const [one] = now.traces;
    const beside = traces.length === 1 && now.traces.length === 1 && now.origin !== "example"
      && one.name !== traces[0].name;
    const all = beside ? [one, ...traces] : traces, reference = await arrange(all);
    if (mine < shown) return;
    shown = mine;
    show(all, reference, origin);
  } catch (problem) { say(problem); }
}

async function blobOf(base64, encoding) {
  const pieces = [], step = 1 << 20;  // of four letters' multiple
  for (let at = 0; at < base64.length; at += step)
    pieces.push(Uint8Array.from(atob(base64.slice(at, at + step)), letter => letter.charCodeAt(0)));
  const blob = new Blob(pieces);
  if (!encoding) return blob;
  return new Response(blob.stream().pipeThrough(new DecompressionStream(encoding))).blob();
}

export async function openEmbedded() {  // the places are those of page.html; parts/view.py fills them too
  const places = [$("trace-a"), $("trace-b")].filter(place => place.textContent.trim());
  try {
    const parts = await Promise.all(places.map(async ({textContent, dataset: {name, encoding}}) =>
      [await blobOf(textContent.trim(), encoding), name]));
    const example = places.some(place => "example" in place.dataset);
    if (parts.length) await open(parts, example ? "example" : "page");
  } catch (problem) { say(problem); }
}

async function fetched(url) {
  const found = await fetch(url).catch(() => ({ok: false, status: "it is not reachable; is the page served?"}));
  if (!found.ok) throw new Error(`${url} cannot be fetched: ${found.status}.`);
  return [await found.blob(), url.split("/").pop()];
}
async function openServed(urls) {  // viewer.html?trace=t.safetensors, when both are served
  try { await open(await Promise.all(urls.map(fetched))); } catch (problem) {
    await openEmbedded();
    say(problem);
  }
}

export function followFiles() {
  const named = files => [...files].map(file => [file, file.name]);
  $("open").onclick = () => $("file").click();
  $("file").onchange = ({target}) => {
    open(named(target.files));
    target.value = "";  // so that the same file can be chosen again
  };
  addEventListener("dragover", event => {
    event.preventDefault();
    document.body.classList.add("over");
  });
  addEventListener("dragleave", () => document.body.classList.remove("over"));
  addEventListener("drop", event => {
    event.preventDefault();
    document.body.classList.remove("over");
    open(named(event.dataTransfer.files));
  });
}

export function openFirst() {
  const urls = new URLSearchParams(location.search).getAll("trace");
  return urls.length ? openServed(urls) : openEmbedded();
}
