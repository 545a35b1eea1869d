// All heads of all layers on one page, as they stand in the model or sorted by what they look at.

import {$, element, show} from "./dom.js";
import {layerOf, matricesOf, partOf} from "./model.js";
import {CHANGED, KINDS, patternCanvas, patternsOf} from "./patterns.js";
import {choose, infoOf, isDifference, isHere, now} from "./state.js";

const AT_ONCE = 3;  // layers: while one is read another is looked at
const kinds = () => isDifference() ? {difference: CHANGED} : KINDS;
const shown = ({sort}, head) => Number.isNaN(head[sort]) ? "–" : head[sort].toFixed(2);

function headButton({layer, head, name, found}, settings, size, signed) {
  const text = settings.order === "layer" ? `${head}` : `${layer}.${head}`;
  const words = Object.entries(kinds()).map(([key, [title]]) => `${title} ${show(found[key])}`).join(", ");
  const button = element("button", {title: `layer ${layer}, head ${head}: ${words}`,
    onclick: () => choose({name, head: now.row * found.heads + head, look: ""})},
  patternCanvas(found, signed, size), `${text} `, element("small", {}, shown(settings, found)));
  button.ariaLabel = button.title;
  Object.assign(button.dataset, {layer, head});
  button.setAttribute("aria-current", name === now.name && head === now.head % found.heads);
  return button;
}

function sizeFor(width, heads) {
  return Math.max(36, Math.min(72, Math.floor((width - 60) / Math.min(heads, 16)) - 12));
}

function byLayer(all, draw) {
  const rows = new Map();
  for (const one of all) rows.set(one.layer, [...rows.get(one.layer) ?? [], draw(one)]);
  return [...rows].map(([layer, buttons]) =>
    element("div", {className: "row", role: "group", ariaLabel: `layer ${layer}`},
      element("b", {}, `layer ${layer}`), ...buttons));
}
function sorted(all, {sort}, draw) {
  const least = kinds()[sort][2], of = ({found}) => Number.isNaN(found[sort]) ? Infinity : least * found[sort];
  return [element("div", {className: "row"}, ...[...all].sort((a, b) => of(a) - of(b)).map(draw))];
}

function chooser(label, pairs, chosen, change) {
  const select = element("select", {ariaLabel: label, onchange: ({target}) => change(target.value)},
    ...pairs.map(([value, words]) => new Option(words, value)));
  select.value = chosen;
  return element("label", {}, `${label} `, select);
}

const settings = {sort: "entropy", order: "layer"};
export const headsPicture = {
  async draw(view) {
    const {name, picture, still} = view, weights = name.replace(/scores$/, "probs");
    const part = partOf(now.names.includes(weights) ? weights : name), signed = isDifference() || part !== partOf(weights);
    const names = now.names.filter(other => partOf(other) === part && isHere(other)), all = [];
    const place = element("div", {className: "heads"}), progress = element("p", {role: "status"});
    if (!(settings.sort in kinds())) settings.sort = Object.keys(kinds())[0];
    const again = change => {
      Object.assign(settings, change);
      arrange();
    };
    const controls = element("div", {className: "choices"}), words = element("p");
    function arrange() {
      controls.replaceChildren(
        chooser("number shown", Object.entries(kinds()).map(([key, [title]]) => [key, title]), settings.sort,
          sort => again({sort})),
        chooser("order", [["layer", "as in the model"], ["sorted", "sorted by it"]], settings.order,
          order => again({order})));
      const [title, meaning, least] = kinds()[settings.sort];
      const none = all.length && all.every(({found}) => Number.isNaN(found[settings.sort]));
      words.textContent = `${title}: ${meaning}. `
        + (none ? "No token of this prompt comes twice. " : "")
        + (settings.order === "sorted" ? `The ${least > 0 ? "least" : "most"} first, layer.head. ` : "")
        + "Each head in its own colours; a click opens it.";
      const size = sizeFor(picture.clientWidth, all[0]?.found.heads ?? 1);
      const draw = one => headButton(one, settings, size, signed);
      place.replaceChildren(...settings.order === "sorted" ? sorted(all, settings, draw) : byLayer(all, draw));
    }
    $("thumbs").replaceChildren();  // they are among these
    picture.replaceChildren(controls, words, progress, place);
    for (let i = 0; i < names.length; i += AT_ONCE) {
      const some = names.slice(i, i + AT_ONCE);
      progress.textContent = `Reading layer ${layerOf(some[0])} …`;
      const found = await Promise.all(some.map(other => patternsOf(other, still)));
      if (!still() || found.includes(null)) return;
      some.forEach((other, k) => {
        const {heads, n, perHead} = matricesOf(other, infoOf(other).shape);
        found[k].forEach((one, head) => all.push({layer: layerOf(other), head, name: other,
          found: {...one, heads: perHead ? heads : n}}));
      });
    }
    progress.remove();
    if (part !== partOf(weights)) all.forEach(({found}) => Object.keys(KINDS).forEach(key => { found[key] = NaN; }));
    arrange();
    view.table = () => [["layer", "head", ...Object.keys(kinds())],
      ...all.map(({layer, head, found}) => [layer, head, ...Object.keys(kinds()).map(key => found[key])])];
    place.querySelector("[aria-current=true]")?.scrollIntoView({block: "nearest"});
  },
};
