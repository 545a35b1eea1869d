// All heads of all layers on one page, as they stand in the model or sorted by what they look at.

import {$, element, show} from "./dom.js";
import {layerOf, matricesOf, partOf} from "./model.js";
import {CHANGED, KINDS, patternsCanvas, patternsOf} from "./patterns.js";
import {choose, infoOf, isDifference, isHere, now} from "./state.js";

const GAP = 8;
const AT_ONCE = 3;  // layers: while one is read another is looked at
const kinds = () => isDifference() ? {difference: CHANGED} : KINDS;

// Where each stands: [one, x, y], and the layers' names. All pictures are in one canvas below the buttons.
function placesOf(all, {order, sort}, width) {
  const heads = all[0]?.found.heads ?? 1, left = order === "layer" ? 52 : 0;
  const size = Math.max(36, Math.min(64, Math.floor((width - left) / Math.min(heads, 16)) - GAP));
  const wide = size + GAP, high = size + GAP + 14, columns = Math.max(1, Math.floor((width - left) / wide));
  const places = [], names = [], least = kinds()[sort][2];
  const of = ({found}) => Number.isNaN(found[sort]) ? Infinity : least * found[sort];
  const some = order === "layer" ? all : [...all].sort((a, b) => of(a) - of(b));
  let top = 0, column = 0, layer = null;
  for (const one of some) {
    const next = order === "layer" && one.layer !== layer;
    if (places.length && (next || column === columns)) {
      top += high;
      column = 0;
    }
    if (next) names.push([`layer ${one.layer}`, top]);
    layer = one.layer;
    places.push([one, left + column++ * wide, top]);
  }
  return {size, wide, high, places, names, height: top + high};
}

function headButton({layer, head, name, found}, {order, sort}, {wide, high}, x, y) {
  const words = Object.entries(kinds()).map(([key, [title]]) => `${title} ${show(found[key])}`).join(", ");
  const number = Number.isNaN(found[sort]) ? "–" : found[sort].toFixed(2), chosen = name === now.name && head === now.head % found.heads;
  const button = element("button", {onclick: () => choose({name, head: now.row * found.heads + head, look: ""})},
    `${order === "layer" ? head : `${layer}.${head}`} `, element("small", {}, number));
  button.ariaLabel = button.title = `layer ${layer}, head ${head}: ${words}`;
  Object.assign(button.dataset, {layer, head});
  button.setAttribute("aria-current", chosen);
  button.style.cssText = `left:${x}px;top:${y}px;width:${wide - 2}px;height:${high - 2}px`;
  return button;
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
      const grid = placesOf(all, settings, picture.clientWidth - 4), {size, places, names, height} = grid;
      const drawn = patternsCanvas(places.map(([{found}, x, y]) => [found, x + GAP / 2 - 1, y + 3]), signed, size,
        picture.clientWidth - 4, height);
      const layerNames = names.map(([text, top]) => {
        const name = element("b", {}, text);
        name.style.top = `${top + size / 2 - 6}px`;
        return name;
      });
      place.style.height = `${height}px`;
      place.replaceChildren(drawn, ...layerNames, ...places.map(([one, x, y]) => headButton(one, settings, grid, x, y)));
    }
    $("thumbs").replaceChildren();  // they are among these
    $("thumbs").dataset.of = "";
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
