// What each layer's output would predict, were it the last.

import {inkOn, legend, rgb} from "./colors.js";
import {css, cut, element, percent, readout} from "./dom.js";
import {LENS} from "./model.js";
import {read} from "./safetensors.js";
import {current, isDifference, now, quoted, tokenName} from "./state.js";

const MOST_COLUMNS = 64, RANGE = {most: 1};

async function lensOf(trace) {  // at(layer, position): [id, probability] of the likeliest; null: there is none
  const found = trace.tensors.get("lens.ids"), beside = trace.tensors.get("lens.probs");
  if (found?.shape.length !== 4 || `${beside?.shape}` !== `${found.shape}`) return null;
  const [L, B, T, top] = found.shape;
  const [ids, probs] = await Promise.all([read(trace, "lens.ids"), read(trace, "lens.probs")]);
  const row = Math.min(now.row, B - 1);
  const at = (layer, position) => Array.from({length: top}, (_, n) => {
    const i = ((layer * B + row) * T + position) * top + n;
    return [ids[i], probs[i]];
  });
  return {L, T, at};
}

function cellOf(trace, ids, layer, position, likeliest) {
  const [id, p] = likeliest[0], cell = element("td", {tabIndex: 0}, cut(quoted(id, trace), 12));
  Object.assign(cell.style, {background: rgb(p, RANGE), color: inkOn(p, RANGE)});
  if (position === now.token) {
    cell.dataset.chosen = "";
    cell.style.outline = `2px solid ${css("--mark")}`;
  }
  cell.onpointerenter = cell.onfocus = () => readout(
    `after ${tokenName(position, ids, trace)}, layer ${layer} would say `
    + likeliest.map(([id, p]) => `${quoted(id, trace)} ${percent(p)} %`).join(", "));
  return cell;
}

function tableOf(trace, {L, T, at}) {
  const ids = trace.rows[now.row] ?? trace.rows[0], from = Math.max(0, Math.min(now.token - 31, T - MOST_COLUMNS));
  const positions = Array.from({length: Math.min(T, MOST_COLUMNS)}, (_, i) => from + i);
  const table = element("table", {ariaLabel: `logit lens of ${trace.name}`}, element("tr", {}, element("th"),
    ...positions.map(t => element("th", {}, `${t} ${cut(tokenName(t, ids, trace), 12)}`))));
  for (let layer = L - 1; layer >= 0; layer--)
    table.append(element("tr", {}, element("th", {}, `layer ${layer}`),
      ...positions.map(t => cellOf(trace, ids, layer, t, at(layer, t)))));
  return element("div", {className: "wide"}, table);
}

export const lensPicture = {
  fits: ({name}) => name === LENS,
  async draw({picture, still}) {
    const traces = isDifference() ? now.traces : [current()], parts = [];
    const lenses = await Promise.all(traces.map(lensOf));
    if (!still()) return;
    lenses.forEach((lens, i) => {
      if (traces.length > 1) parts.push(element("h3", {}, traces[i].name));
      parts.push(lens ? tableOf(traces[i], lens) : "This trace holds no logit lens; --save-trace of the script writes it.");
    });
    if (lenses.some(Boolean)) parts.push(legend(RANGE, "probability of the likeliest"));
    picture.replaceChildren(
      element("p", {}, "If a layer were the last (its output through the final norm and the head), what would "
        + `come next?${lenses.some(lens => lens?.T > MOST_COLUMNS) ? ` Here for ${MOST_COLUMNS} positions around the chosen one.` : ""}`
        + (isDifference() ? " Of both, one below the other: words have no difference." : "")),
      ...parts);
    for (const cell of picture.querySelectorAll("[data-chosen]"))
      cell.scrollIntoView({block: "nearest", inline: "nearest"});
  },
};
