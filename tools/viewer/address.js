// What is chosen, in the page's address: #tensor=NAME&head=2&token=5&cell=5,17&side=b

import {lookOf, looksOf} from "./looks.js";
import {LENS, isAttention, matricesOf} from "./model.js";
import {SIDES, choose, infoOf, now, watchChoice} from "./state.js";

let written = false;  // by this page; else the address is what somebody came with

function addressOf() {
  const parts = [`tensor=${encodeURIComponent(now.name)}`], add = (key, value) => parts.push(`${key}=${value}`);
  const info = now.name === LENS ? null : infoOf(now.name);
  const {heads, perHead, n} = info ? matricesOf(now.name, info.shape) : {heads: 1, n: 1};
  if (perHead) add("head", now.head % heads);
  if (n > heads) add("row", Math.floor(now.head / heads));
  if (now.pair) add("pair", now.pair);
  add("token", now.token);
  if (now.cell) add("cell", now.cell.join(","));
  if (now.traces.length > 1) add("side", SIDES[now.side]);
  if (lookOf(now.name)) add("look", now.look);
  if (isAttention(now.name) && now.overlay.length) add("heads", now.overlay.join(","));
  return `#${parts.join("&")}`;
}

// The choice that the address asks for, as far as the opened trace has it.
export function asked() {
  const hash = location.hash.slice(1);
  if (!hash.includes("=")) return pick({tensor: decode(hash)});
  return pick(Object.fromEntries(new URLSearchParams(hash)));
}
function decode(text) {
  try { return decodeURIComponent(text); } catch { return text; }
}
function pick({tensor, head, row, pair, token, cell, side, look, heads}) {
  const found = {cell: /^\d+,\d+$/.test(cell) ? cell.split(",").map(Number) : null}, whole = text => /^\d+$/.test(text) ? +text : undefined;
  if (now.names.includes(tensor)) found.name = tensor;
  if (whole(head) !== undefined || whole(row) !== undefined) {
    const name = found.name ?? now.name, info = name === LENS ? null : infoOf(name);
    const heads = info ? matricesOf(name, info.shape).heads : 1;
    found.head = (whole(row) ?? 0) * heads + (whole(head) ?? 0);
  }
  if (whole(pair) !== undefined) found.pair = whole(pair);
  if (whole(token) !== undefined) found.token = whole(token);
  const wanted = found.name ?? now.name;
  found.look = looksOf(wanted).some(([key]) => key === look) ? look : "";
  found.overlay = /^\d+(,\d+)*$/.test(heads) && isAttention(wanted) ? heads.split(",").map(Number) : [];
  if (SIDES.indexOf(side) > 0 && now.traces.length > 1) found.side = SIDES.indexOf(side);
  return found;
}
export const broughtAlong = () => written ? {} : asked();

function write(how) {
  const address = addressOf();
  if (how.keep || address === location.hash) return;
  if (how.opened && !written) return;  // what somebody came with may be meant for the file opened next
  written = true;
  history[how.opened || how.replace ? "replaceState" : "pushState"](null, "", address);
}

export function followAddress() {
  watchChoice((change, still, how) => write(how));
  addEventListener("popstate", () => {
    if (now.names.length) choose({side: 0, ...asked()}, {keep: true});
  });
}
