// Three steps for who comes for the first time.

import {$} from "./dom.js";
import {now} from "./state.js";

const KEY = "llama3-viewer-hint";

function remembered() {
  try { return localStorage.getItem(KEY) !== null; } catch { return false; }  // it may be forbidden
}
export function offerHint() {
  $("hint").hidden = now.origin === "file" || remembered();
  $("own").hidden = now.origin !== "example";
}
export function followHint() {
  $("dismiss").onclick = () => {
    $("hint").hidden = true;
    try { localStorage.setItem(KEY, "seen"); } catch { /* then it comes again */ }
  };
}
