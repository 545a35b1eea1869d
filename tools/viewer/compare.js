// Two traces: which differs where, in words.

import {$, element, show} from "./dom.js";
import {LENS} from "./model.js";
import {choose, now, watchChoice} from "./state.js";

const HALVES = 3e-2, FULL = 1e-5;  // what 16 bits round, all later tensors inherit
const inHalves = trace => /16$/.test(trace.about.dtype ?? "")
  || [...trace.tensors.values()].some(info => /F16$/.test(info.dtype));
const tolerance = () => now.traces.some(inHalves) ? HALVES : FULL;

export function differs(found) {  // found: of statistics()
  const error = found?.error;
  return typeof error === "string" ? error === "other shape" : error > tolerance();
}
export const errorText = ({error}) => typeof error === "string" ? error : `error ${show(error)}`;

export function tellFirst(stats) {  // stats: by name, as far as they are known
  if (now.traces.length < 2) return;
  const left = now.names.find(name => name !== LENS && !stats.has(name));
  const first = now.names.find(name => differs(stats.get(name)));
  if (!first || (left && now.names.indexOf(left) < now.names.indexOf(first))) {
    $("first").replaceChildren(left ? "Comparing …" : "The two agree in all they share.");
    return;
  }
  const {error} = stats.get(first);
  const button = element("button", {onclick: () => choose({name: first})}, first);
  $("first").replaceChildren("First that differs: ", button,
    ` relative error ${typeof error === "string" ? error : show(error)}`);
}

export function offerSides() {
  const words = [...now.traces.map(trace => trace.name), "first − second"];
  $("side").hidden = now.traces.length < 2;
  $("side").replaceChildren(...words.map((text, side) => new Option(text, side)));
}
export function followSide() {
  $("side").onchange = event => {
    choose({side: +event.target.value});
    event.target.blur();
  };
  watchChoice(() => { $("side").value = now.side; });
}
