// Counts every tensor's numbers in the background: what is in sight first, and of two traces all of them.

import {$, say} from "./dom.js";
import {LENS} from "./model.js";
import {now, watchChoice} from "./state.js";
import {statistics} from "./statistics.js";

export const stats = new Map();  // by name, once they are known
let waiting = new Set(), counting = false, stopped = false;
const done = {read: 0, all: 0};  // numbers, of two traces that are compared
const watchers = [];
export const watchCounts = watcher => watchers.push(watcher);  // name, or none where only the progress is new
const tell = name => watchers.forEach(watcher => watcher(name));

export const counted = () => ({...done, stopped, busy: counting && waiting.size > 0});
export function stopCounting(stop) {
  stopped = stop;
  tell();
  countWaiting();
}

const numbersOf = name => now.traces.reduce((n, trace) => n + (trace.tensors.get(name)?.count ?? 0), 0);
// What is chosen is counted before the rest, and nothing while a picture is being drawn.
const nextOne = () => waiting.has(now.name) ? now.name : waiting.values().next().value;
async function whenDrawn(still) {
  for (let n = 0; still() && $("picture").ariaBusy === "true" && n < 100; n++) await new Promise(go => setTimeout(go, 20));
}

async function countWaiting() {
  if (counting || stopped) return;
  counting = true;
  for (let name; name = nextOne(), name !== undefined && !stopped;) {
    const {traces} = now, still = () => traces === now.traces && !stopped, before = done.read;
    await whenDrawn(still);
    try {
      const found = still() && await statistics(name, n => {
        done.read = Math.min(done.all, done.read + n);
        tell();
        return still() && (now.name === name || !waiting.has(now.name));
      });
      if (traces !== now.traces) continue;
      if (found) {
        stats.set(name, found);
        waiting.delete(name);
        done.read = Math.min(done.all, before + numbersOf(name));
        tell(name);
      } else done.read = before;
    } catch (problem) {
      waiting.delete(name);
      if (traces === now.traces) say(problem);
    }
    await new Promise(go => setTimeout(go));  // lets the page breathe
  }
  counting = false;
  tell();
}

export function startCounting() {  // anew, for the traces that there are now
  stats.clear();
  stopped = false;
  const all = now.traces.length > 1 ? now.names.filter(name => name !== LENS) : [];
  waiting = new Set(all);
  Object.assign(done, {read: 0, all: all.reduce((n, name) => n + numbersOf(name), 0)});
  countWaiting();
}
export function countSoon(name) {
  if (name !== LENS && !stats.has(name)) waiting.add(name);
  countWaiting();
}

export function followCounts() {
  watchChoice(() => { countWaiting(); });
}
