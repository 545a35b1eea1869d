// What the model would predict, were it to end after a layer, or after a layer's attention.

import {inkOn, legend, rgb} from "./colors.js";
import {css, cut, element, percent, readout} from "./dom.js";
import {guessAt} from "./guess.js";
import {LENS} from "./model.js";
import {read} from "./safetensors.js";
import {choose, current, isDifference, now, quoted, tokenName} from "./state.js";

const MOST_COLUMNS = 64;
const ways = {prob: "probability", rank: "rank", entropy: "entropy"};
const how = {shown: "prob", attention: true};  // as long as the page is open

async function lensOf(trace, kind) {  // "lens" or "lens.attention"; null: there is none
  const found = trace.tensors.get(`${kind}.ids`), beside = trace.tensors.get(`${kind}.probs`);
  if (found?.shape.length !== 4 || `${beside?.shape}` !== `${found.shape}`) return null;
  const [L, B, T, top] = found.shape, row = Math.min(now.row, B - 1);
  const more = async name => `${trace.tensors.get(name)?.shape}` === `${[L, B, T]}` ? read(trace, name) : null;
  const [ids, probs, rank, entropy] = await Promise.all([read(trace, `${kind}.ids`), read(trace, `${kind}.probs`),
    more(`${kind}.rank`), more(`${kind}.entropy`)]);
  const at = (layer, position) => {  // likeliest: [id, probability]; rank of the final token, 1 the likeliest
    const place = (layer * B + row) * T + position;
    const likeliest = Array.from({length: top}, (_, n) => [ids[place * top + n], probs[place * top + n]]);
    return {likeliest, rank: rank && rank[place] + 1, entropy: entropy && entropy[place]};
  };
  return {kind, L, T, at, ranked: rank !== null && entropy !== null};
}

const rankPart = (rank, V) => 1 - Math.log(rank) / Math.log(Math.max(V, 2));
function partOfCell({likeliest, rank, entropy}, V, trace) {  // how strongly it is coloured, and what stands in it
  if (how.shown === "rank" && rank) return [Math.max(0, rankPart(rank, V)), `${rank}`];
  if (how.shown === "entropy" && entropy !== null) return [Math.min(1, entropy / Math.log2(V)), entropy.toFixed(1)];
  return [likeliest[0][1], cut(quoted(likeliest[0][0], trace), 12)];
}

function cellOf({trace, ids, V}, who, layer, position, found) {
  const [part, text] = partOfCell(found, V, trace), cell = element("td", {tabIndex: 0}, text), {likeliest, rank, entropy} = found;
  Object.assign(cell.style, {background: rgb(part, {most: 1}), color: inkOn(part, {most: 1})});
  if (position === now.token) {
    cell.dataset.chosen = "";
    cell.style.outline = `2px solid ${css("--mark")}`;
  }
  cell.onpointerenter = cell.onfocus = () => readout(
    `after ${tokenName(position, ids, trace)}, layer ${layer}${who} would say `
    + likeliest.map(([id, p]) => `${quoted(id, trace)} ${percent(p)} %`).join(", ")
    + (rank ? `; the final token is number ${rank}` : "") + (entropy !== null ? `; entropy ${entropy.toFixed(2)} bits` : ""));
  cell.onclick = () => choose({token: position, cell: guessAt(layer, who !== "", position)});
  return cell;
}

function tableOf(trace, after, between) {
  const {L, T} = after, from = Math.max(0, Math.min(now.token - 31, T - MOST_COLUMNS));
  const ids = trace.rows[now.row] ?? trace.rows[0], V = trace.tensors.get("logits")?.shape.at(-1) ?? trace.params.vocab_size;
  const about = {trace, ids, V: V ?? 2 ** 17};
  const positions = Array.from({length: Math.min(T, MOST_COLUMNS)}, (_, i) => from + i);
  const table = element("table", {className: "lens", ariaLabel: `logit lens of ${trace.name}`}, element("tr", {}, element("th"),
    ...positions.map(t => element("th", {}, `${t} ${cut(tokenName(t, ids, trace), 12)}`))));
  for (let layer = L - 1; layer >= 0; layer--) {
    const line = ({at}, who, title) => element("tr", {className: who ? "between" : ""}, element("th", {}, title),
      ...positions.map(t => cellOf(about, who, layer, t, at(layer, t))));
    table.append(line(after, "", `layer ${layer}`));
    if (between && how.attention) table.append(line(between, "'s attention", "  its attention"));
  }
  return element("div", {className: "wide"}, table);
}

function numbersOf(trace, kinds) {  // for a file
  const ids = trace.rows[now.row] ?? trace.rows[0], lines = [];
  for (const {kind, L, T, at} of kinds) for (let layer = 0; layer < L; layer++) for (let t = 0; t < T; t++) {
    const {likeliest, rank, entropy} = at(layer, t), who = kind === "lens" ? "layer" : "attention";
    likeliest.forEach(([id, p], n) => lines.push([trace.name, layer, who, t, tokenName(t, ids, trace), n + 1, id,
      quoted(id, trace), p, rank ?? "", entropy ?? ""]));
  }
  return lines;
}
const NONE = "This trace holds no logit lens; --save-trace of the script writes it.";
const HEAD = ["trace", "layer", "after", "position", "token", "n", "id", "text", "probability",
  "rank of the final token", "entropy in bits"];

function choices(ranked, between, draw) {
  const buttons = Object.entries(ways).map(([key, words]) => {
    const button = element("button", {disabled: key !== "prob" && !ranked, onclick: () => draw({shown: key})}, words);
    button.setAttribute("aria-pressed", key === how.shown);
    button.dataset.lens = key;
    return button;
  });
  const box = element("input", {type: "checkbox", checked: how.attention && between, disabled: !between,
    onchange: () => draw({attention: box.checked})});
  const missing = [...between ? [] : ["what attention alone would say"], ...ranked ? [] : ["rank and entropy"]];
  return element("div", {className: "choices"}, element("span", {role: "group", ariaLabel: "number shown"}, ...buttons),
    element("label", {}, box, " after attention too"),
    missing.length ? element("small", {}, `This trace holds no ${missing.join(", no ")}; today's --save-trace writes it.`) : "");
}

const MEANING = {prob: "probability of the likeliest", rank: "rank of the token that the whole model finds likeliest; 1: the layer agrees",
  entropy: "entropy in bits: 0 is certain, dark is undecided"};

export const lensPicture = {
  fits: ({name}) => name === LENS,
  async draw(view) {
    const {picture, still} = view, traces = isDifference() ? now.traces : [current()];
    const lenses = await Promise.all(traces.map(async trace => ({trace,
      kinds: (await Promise.all([lensOf(trace, "lens"), lensOf(trace, "lens.attention")]))})));
    if (!still()) return;
    const there = lenses.filter(({kinds: [after]}) => after);
    if (!there.length) {
      picture.replaceChildren(NONE);
      return;
    }
    const ranked = there.every(({kinds: [after]}) => after.ranked), between = there.every(({kinds}) => kinds[1]);
    view.table = () => [HEAD, ...there.flatMap(({trace, kinds}) => numbersOf(trace, kinds.filter(Boolean)))];
    const long = there.some(({kinds: [{T}]}) => T > MOST_COLUMNS);
    function draw(change) {
      Object.assign(how, change);
      if (!ranked) how.shown = "prob";
      const shown = lenses.map(({trace, kinds}) => [traces.length > 1 ? element("h3", {}, trace.name) : "",
        kinds[0] ? tableOf(trace, ...kinds) : NONE]);
      picture.replaceChildren(
        element("p", {}, "If a layer were the last (what it leaves through the final norm and the head), what would "
          + "come next?" + (long ? ` Here for ${MOST_COLUMNS} positions around the chosen one.` : "")
          + (isDifference() ? " Of both, one below the other: words have no difference." : "")),
        choices(ranked, between, draw), ...shown.flat(),
        how.shown === "prob" ? legend({most: 1}, MEANING.prob) : element("p", {className: "legend"}, MEANING[how.shown]));
      if (change.shown) picture.querySelector(`[data-lens=${how.shown}]`).focus({preventScroll: true});
      for (const cell of picture.querySelectorAll("[data-chosen]"))
        cell.scrollIntoView({block: "nearest", inline: "nearest"});
    }
    draw({});
  },
};
