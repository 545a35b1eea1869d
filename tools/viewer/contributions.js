// What each layer and each head gave to the logit of the likeliest token.

import {legend, rangeOf} from "./colors.js";
import {element, show} from "./dom.js";
import {LENS} from "./model.js";
import {bars, heat} from "./picture.js";
import {read} from "./safetensors.js";
import {choose, current, isDifference, now, quoted, tokenName} from "./state.js";

const NAMES = ["ids", "embedding", "layers", "heads"].map(name => `attribution.${name}`);

async function partsOf(trace) {
  if (!NAMES.every(name => trace.tensors.has(name))) return null;
  const [ids, embedding, added, heads] = await Promise.all(NAMES.map(name => read(trace, name)));
  const [L, H, B, T] = trace.tensors.get("attribution.heads").shape;
  if (!(T > 0) || added.length !== L * 2 * B * T) return null;
  const at = Math.min(now.row, B - 1) * T + Math.min(now.token, T - 1);
  return {id: ids[at], embedding: embedding[at], L, H,
    added: (layer, which) => added[(layer * 2 + which) * B * T + at],
    heads: Float32Array.from({length: L * H}, (_, i) => heads[i * B * T + at])};
}

export const contributionsPanel = {
  title: "What gave the likeliest token its logit",
  fits: ({name}) => (name === LENS || name === "logits") && !isDifference(),
  async draw({still}, place) {
    const found = await partsOf(current());
    if (!still()) return;
    if (!found) {
      place.append(element("p", {}, "This trace does not hold what each layer and head gave to a logit "
        + "(attribution.layers and attribution.heads); today's --save-trace writes it."));
      return;
    }
    const {id, embedding, L, H, added, heads} = found, rows = [["embedding", embedding, show(embedding)]];
    for (let layer = 0; layer < L; layer++) ["attention", "feed-forward"].forEach((words, which) =>
      rows.push([`layer ${layer} ${words}`, added(layer, which), show(added(layer, which))]));
    const sum = rows.reduce((total, [, x]) => total + x, 0);
    rows.push(["their sum: the logit", sum, show(sum)]);
    const range = rangeOf(heads, true), words = (i, j, x) => `layer ${i}, head ${j} gave ${show(x)} of the ${show(sum)}`;
    const grid = heat(heads, L, H, {range, rowName: i => `layer ${i}`, colName: j => `head ${j}`, words,
      label: `what each head gave to the logit of ${quoted(id)}`, pick: (i, j) => {
        const name = `layers.${i}.attention.probs`;
        if (now.names.includes(name)) choose({name, head: now.row * H + j, look: ""});
      }});
    place.append(
      element("p", {}, `After ${tokenName(now.token)} the model finds ${quoted(id)} likeliest. Its logit is a sum: what each block `
        + "added to the residual stream, divided by the final norm's one number and multiplied by the token's row of the head."),
      element("div", {className: "besides"}, bars(rows),
        element("div", {}, element("p", {}, "Of attention, what each head gave (a click opens it):"), grid, legend(range))));
  },
};
