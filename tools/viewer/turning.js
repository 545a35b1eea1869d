// How fast each pair turns, and what turning does to a score: the query moved to another position.

import {css, cut, element, readout, show} from "./dom.js";
import {isPaired, layerOf, matricesOf} from "./model.js";
import {canvasOf, pointAt} from "./picture.js";
import {choose, current, infoOf, isDifference, isHere, now, tokenIds, tokenName, values} from "./state.js";
import {walkable} from "./walking.js";

const DEGREES = 180 / Math.PI, HEIGHT = 190, LEFT = 58, SIDE = 250, LONGEST = 4096;

// Radians a token of each pair, as params.json has it; null: it does not say.
export function promised(params, E) {
  const {rope_theta: theta, use_scaled_rope: scaled, rope_scaling_factor: factor, rope_low_freq_factor: low = 1,
    rope_high_freq_factor: high = 4, rope_original_context: context = 8192} = params;
  if (!(theta > 0) || (scaled && !(factor > 0))) return null;
  return Float64Array.from({length: E / 2}, (_, pair) => {
    const plain = theta ** (-2 * pair / E);
    if (!scaled) return plain;
    const keep = Math.max(0, Math.min(1, (context * plain / (2 * Math.PI) - low) / (high - low)));
    return (1 - keep) * plain / factor + keep * plain;
  });
}

// As the trace shows it: from position to position the turn is known better, and so how often it went around.
export function seen(before, after, rows, cols) {
  return Float64Array.from({length: cols / 2}, (_, pair) => {
    let each = NaN;
    for (let t = 1; t < rows; t++) {
      const [x, y, u, v] = [before, after].flatMap(data => [...data.subarray(t * cols + 2 * pair, t * cols + 2 * pair + 2)]);
      const turn = Math.atan2(x * v - y * u, x * u + y * v);
      if (!Number.isFinite(turn) || !(Math.hypot(x, y) > 0)) continue;
      const rounds = Number.isNaN(each) ? 0 : Math.round((t * each - turn) / (2 * Math.PI));
      each = (turn + 2 * Math.PI * rounds) / t;
    }
    return each;
  });
}

async function bothOf(plain, head) {  // a head's numbers before and after RoPE, where they are
  const {size} = matricesOf(plain, infoOf(plain).shape);
  return Promise.all([plain, `${plain}_rotated`].map(key => isHere(key) ? values(key, head * size, size) : null));
}

// ---------------------------------------- degrees a token

function ticks(low, high) {  // powers of ten
  const all = [];
  for (let power = Math.ceil(low); power <= high; power++) all.push(power);
  return all;
}
const degreesText = each => {
  const degrees = Math.abs(each) * DEGREES, around = 360 / degrees;
  return `${show(degrees)}° a token, once around in ${around < 1e6 ? show(+around.toPrecision(3)) : around.toExponential(1)} tokens`;
};

function speeds(found, said, width) {
  const n = (found ?? said).length, [canvas, pen] = canvasOf(width, HEIGHT), room = width - LEFT - 8;
  const sizes = [...found ?? [], ...said ?? []].map(x => Math.log10(Math.abs(x) * DEGREES)).filter(Number.isFinite);
  const low = Math.min(...sizes) - .2, high = Math.max(...sizes) + .2;
  const x = pair => LEFT + (pair + .5) / n * room, y = each => 8 + (high - Math.log10(Math.abs(each) * DEGREES)) / (high - low) * (HEIGHT - 26);
  pen.strokeStyle = css("--line");
  pen.fillStyle = css("--faint");
  for (const power of ticks(low, high)) {
    const at = y(10 ** power / DEGREES);
    pen.beginPath();
    pen.moveTo(LEFT, at);
    pen.lineTo(width - 8, at);
    pen.stroke();
    pen.textAlign = "right";
    pen.fillText(`${power < -3 ? `1e${power}` : 10 ** power}°`.replace("-", "−"), LEFT - 6, at);
  }
  pen.textAlign = "left";
  pen.fillText("pair 0", LEFT, HEIGHT - 7);
  pen.textAlign = "right";
  pen.fillText(`pair ${n - 1}`, width - 8, HEIGHT - 7);
  if (said) {
    pen.strokeStyle = css("--faint");
    pen.beginPath();
    said.forEach((each, pair) => pair ? pen.lineTo(x(pair), y(each)) : pen.moveTo(x(pair), y(each)));
    pen.stroke();
  }
  found?.forEach((each, pair) => {
    if (!Number.isFinite(each) || !each) return;
    pen.fillStyle = css(said && isOff(each, said[pair]) ? "--alarm" : "--mark");
    pen.beginPath();
    pen.arc(x(pair), y(each), pair === now.pair ? 6 : 3.2, 0, 7);
    pen.fill();
  });
  const pairAt = px => Math.max(0, Math.min(n - 1, Math.floor((px - LEFT) / room * n)));
  const words = pair => `pair ${pair}: ${degreesText((found ?? said)[pair])}`
    + (said && found ? `; params.json says ${show(said[pair] * DEGREES)}°` : "");
  pointAt(canvas, px => readout(words(pairAt(px))));
  canvas.onclick = event => choose({pair: pairAt(event.offsetX * width / canvas.clientWidth)});
  walkable(canvas, {label: `degrees a token of ${n} pairs`, rows: 1, cols: n, tell: (i, pair) => words(pair),
    pick: (i, pair) => choose({pair}), boxOf: (i, pair) => [LEFT + pair / n * room, 8, room / n, HEIGHT - 30]});
  return canvas;
}
const isOff = (each, said) => Math.abs(each - said) > Math.max(.03 * Math.abs(said), 2e-3);

export const speedPanel = {
  title: "Degrees a token, for each pair",
  fits: ({name, shape}) => isPaired(name, shape) && !isDifference(),
  async draw({name, layout: {rows, cols}, picture, still}, place) {
    const plain = name.replace("_rotated", ""), said = promised(current().params, cols);
    const [before, after] = infoOf(plain) ? await bothOf(plain, now.head) : [];
    if (!still()) return;
    const found = before && after && rows > 1 ? seen(before, after, rows, cols) : null;
    if (!found && !said) {
      place.append(element("p", {}, "Neither q and k before and after RoPE nor its params are in this trace."));
      return;
    }
    const each = (found ?? said)[now.pair], off = found && said ? [...found.keys()].filter(pair => isOff(found[pair], said[pair])) : [];
    place.append(
      element("p", {}, `Pair ${now.pair} turns ${degreesText(each)}. ${found ? "Dots: as this trace turned them" : "Line: as params.json has it"}`
        + `${found && said ? "; line: as params.json has it" : ""}. The first pairs tell neighbours apart, the last ones far places.`),
      off.length ? element("p", {className: "alarm"}, `Pairs ${off.slice(0, 8).join(", ")}${off.length > 8 ? " …" : ""} turn otherwise than params.json says.`) : "",
      speeds(found, said, Math.min(640, Math.max(260, picture.clientWidth - 4))));
  },
};

// ---------------------------------------- a query and a key

const turned = ([x, y], by) => [x * Math.cos(by) - y * Math.sin(by), x * Math.sin(by) + y * Math.cos(by)];
const dot = ([a, b], [c, d]) => a * c + b * d;
const pairOf = (row, pair) => [row[2 * pair], row[2 * pair + 1]];

function meet(q, k, width) {  // two arrows
  const [canvas, pen] = canvasOf(width, width), middle = width / 2, most = Math.max(Math.hypot(...q), Math.hypot(...k), 1e-30);
  const reach = middle - 30;
  pen.strokeStyle = css("--line");
  pen.strokeRect(.5, .5, width - 1, width - 1);
  pen.beginPath();
  pen.arc(middle, middle, reach, 0, 7);
  pen.stroke();
  const arrow = ([x, y], ink, text) => {
    const [u, v] = [middle + x / most * reach, middle - y / most * reach], back = Math.atan2(v - middle, u - middle);
    pen.strokeStyle = pen.fillStyle = ink;
    pen.lineWidth = 2.5;
    pen.beginPath();
    pen.moveTo(middle, middle);
    pen.lineTo(u, v);
    pen.stroke();
    pen.beginPath();
    pen.moveTo(u + 4 * Math.cos(back), v + 4 * Math.sin(back));
    for (const side of [-.45, .45]) pen.lineTo(u - 8 * Math.cos(back + side), v - 8 * Math.sin(back + side));
    pen.fill();
    pen.fillText(text, Math.max(6, Math.min(width - 20, u + (x < 0 ? -16 : 9))), Math.max(8, Math.min(width - 8, v + (y < 0 ? 12 : -10))));
  };
  const shown = [q, k].map(([x, y]) => Math.atan2(y, x));
  pen.fillStyle = css("--marked");
  pen.beginPath();  // the angle between them
  pen.moveTo(middle, middle);
  let between = shown[0] - shown[1];
  between -= 2 * Math.PI * Math.round(between / 2 / Math.PI);
  pen.arc(middle, middle, reach / 3, -shown[1], -shown[1] - between, between > 0);
  pen.fill();
  pen.font = "600 13px system-ui, sans-serif";
  arrow(k, css("--alarm"), "k");
  arrow(q, css("--mark"), "q");
  canvas.role = "img";
  canvas.ariaLabel = `q and k of the pair as arrows, ${show(Math.abs(between) * DEGREES)}° apart`;
  return canvas;
}

function curves(parts, totals, at, width) {  // a score at each distance: the pair's part, and all pairs
  const [canvas, pen] = canvasOf(width, HEIGHT), room = width - LEFT - 8, all = [...parts, ...totals];
  const low = Math.min(0, ...all), high = Math.max(0, ...all), y = s => 10 + (high - s) / (high - low || 1) * (HEIGHT - 32);
  const x = d => LEFT + d / Math.max(1, totals.length - 1) * room;
  pen.strokeStyle = css("--line");
  pen.fillStyle = css("--faint");
  pen.textAlign = "right";
  for (const level of new Set([low, 0, high])) {
    pen.beginPath();
    pen.moveTo(LEFT, y(level));
    pen.lineTo(width - 8, y(level));
    pen.stroke();
    pen.fillText(show(+level.toPrecision(3)), LEFT - 6, y(level));
  }
  pen.textAlign = "left";
  pen.fillText("distance 0", LEFT, HEIGHT - 8);
  pen.textAlign = "right";
  pen.fillText(`${totals.length - 1}`, width - 8, HEIGHT - 8);
  for (const [line, ink, wide] of [[totals, css("--faint"), 1], [parts, css("--mark"), 2]]) {
    pen.strokeStyle = ink;
    pen.lineWidth = wide;
    pen.beginPath();
    line.forEach((s, d) => d ? pen.lineTo(x(d), y(s)) : pen.moveTo(x(d), y(s)));
    pen.stroke();
    if (!(at in line)) continue;
    pen.fillStyle = ink;
    pen.beginPath();
    pen.arc(x(at), y(line[at]), 4.5, 0, 7);
    pen.fill();
  }
  const words = d => `${d} tokens apart: this pair gives ${show(parts[d])} of a score of ${show(totals[d])}`;
  const nearest = px => Math.round((px - LEFT) / room * (totals.length - 1));
  pointAt(canvas, px => readout(words(Math.max(0, Math.min(totals.length - 1, nearest(px))))));
  walkable(canvas, {label: "the score by distance", rows: 1, cols: totals.length, tell: (i, d) => words(d),
    boxOf: (i, d) => [x(d) - 3, 8, 6, HEIGHT - 30]});
  return canvas;
}

function headsOf({name, layout: {heads, perHead}}) {  // the query head, and the key head it asks
  const layer = layerOf(name), [Q, K] = ["q", "k"].map(part => matricesOf(`layers.${layer}.attention.${part}`,
    infoOf(`layers.${layer}.attention.${part}`).shape).heads);
  const row = perHead ? now.row : 0, own = now.head - row * heads, group = Math.max(1, Q / K);
  const isKey = /attention\.k/.test(name), h = isKey ? own * group : own;
  return {q: row * Q + h, k: row * K + Math.floor(h / group), h, group: Math.floor(h / group)};
}

let key = 0;  // the position of the key
export const meetingPanel = {
  title: "A query and a key, and the score that results",
  fits: ({name, shape}) => isPaired(name, shape) && !isDifference()
    && ["q_rotated", "k_rotated", "q", "k"].every(part => isHere(`layers.${layerOf(name)}.attention.${part}`)),
  async draw(view, place) {
    const {name, layout: {rows, cols}, picture, still} = view, layer = `layers.${layerOf(name)}.attention`;
    const at = headsOf(view), m = Math.min(now.token, rows - 1), pair = now.pair;
    const [[q0, q1], [k0, k1]] = await Promise.all([bothOf(`${layer}.q`, at.q), bothOf(`${layer}.k`, at.k)]);
    if (!still()) return;
    const each = promised(current().params, cols) ?? seen(q0, q1, rows, cols), root = Math.sqrt(cols);
    key = Math.min(key, m);
    const row = (data, i) => data.subarray(i * cols, (i + 1) * cols), most = Math.min(LONGEST, Math.max(2 * rows, 64));
    const slider = element("input", {type: "range", min: 0, max: most, value: m, ariaLabel: "position of the query"});
    const keys = element("select", {ariaLabel: "the key's token"}, ...tokenIds().slice(0, m + 1).map((_, i) =>
      new Option(`${i} ${cut(tokenName(i), 14)}`, i)));
    keys.value = key;
    const words = element("p", {role: "status"}), drawing = element("div", {className: "besides"});
    function draw() {
      const position = +slider.value, q = row(q1, m), k = row(k1, key);
      // Both turn; the score hears of the difference alone. At its own place q is as the trace has it.
      const score = (d, one) => dot(turned(pairOf(q, one), (d - (m - key)) * each[one]), pairOf(k, one)) / root;
      const reach = Math.max(most - key, 1), parts = new Float64Array(reach + 1), totals = new Float64Array(reach + 1);
      for (let d = 0; d <= reach; d++) for (let one = 0; one < cols / 2; one++) {
        const part = score(d, one);
        totals[d] += part;
        if (one === pair) parts[d] = part;
      }
      const far = position - key, exact = one => score(far, one);
      let total = 0;
      for (let one = 0; one < cols / 2; one++) total += exact(one);
      slider.ariaValueText = `position ${position}`;
      const moved = position === m ? "where it stands" : `moved to position ${position}`;
      words.replaceChildren(`${tokenName(m)} asks, ${moved}; ${tokenName(key)} at ${key} answers. Pair ${pair} gives `,
        element("b", {}, show(exact(pair))), " of the score ", element("b", {id: "score"}, show(total)),
        ` (head ${at.h}, key/value head ${at.group}; q · k / √${cols})`
        + (far < 0 ? ". The query would stand before the key: the mask hides it." : "."));
      const width = Math.max(240, Math.min(420, picture.clientWidth - SIDE - 20));
      drawing.replaceChildren(
        meet(turned(pairOf(q, pair), (position - m) * each[pair]), pairOf(k, pair), SIDE),
        element("div", {}, curves(parts, totals, far, width), element("p", {className: "legend"},
          "The score by distance: blue this pair, grey all pairs together.")));
    }
    slider.oninput = draw;
    keys.onchange = () => {
      key = +keys.value;
      draw();
    };
    draw();
    place.append(element("div", {className: "choices"}, element("label", {}, "query at position ", slider),
      element("label", {}, "key ", keys),
      element("button", {onclick: () => { slider.value = m; draw(); }}, "back to its place")), words, drawing);
  },
};
