// Beneath the name of a tensor: its colours' range, a closer look, and what can be taken away as a file.

import {$, css, element, readout, say} from "./dom.js";
import {lookOf} from "./looks.js";
import {LENS, columnName, dimsOf, isAttention, matrixName} from "./model.js";
import {isZoomed, reachOf} from "./sheet.js";
import {SIDES, choose, current, isDifference, now, quoted, tokenIds, tokenName, values} from "./state.js";

const STEP = 1 << 18, MOST = 5_000_000;  // numbers that are read at once, and that one file may hold

function save(blob, ending) {
  const {name, head, side} = now, link = element("a", {href: URL.createObjectURL(blob)});
  const parts = [name === LENS ? "logit_lens" : name, lookOf(name), head && name !== LENS && !lookOf(name) ? `head${head}` : "",
    now.traces.length > 1 ? SIDES[side] : ""];
  link.download = `${parts.filter(Boolean).join(".").replace(/[^\w.-]/g, "_")}.${ending}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  readout(`Saved as ${link.download}.`);
}

// Texts stand in quotes, so that no program that opens the file takes one for a formula.
function fieldOf(x) {
  if (typeof x === "string") return /^[\w. ]*$/.test(x) ? x : `"${x.replaceAll('"', '""')}"`;
  return Number.isNaN(x) ? "nan" : Number.isFinite(x) ? `${x}` : x < 0 ? "-inf" : "inf";
}
const lineOf = fields => `${fields.map(fieldOf).join(",")}\n`;

// The matrix that is looked at, row by row as it stands in the file.
async function matrixLines({name, layout: {rows, cols, size}}) {
  const skipped = Math.max(0, tokenIds().length - rows), perToken = Boolean(dimsOf(name)) && rows > 1;
  const only = size > MOST ? Math.min(now.token, rows - 1) : null;  // more than a table could hold
  const column = j => isAttention(name) ? tokenName(j) : `${columnName(name)} ${j}`;
  const lines = [lineOf([...perToken ? ["position", "token"] : ["row"], ...Array.from({length: cols}, (_, j) => column(j))])];
  const [first, end] = only === null ? [0, rows] : [only, only + 1], each = Math.max(1, Math.floor(STEP / cols));
  for (let row = first; row < end; row += each) {
    const count = Math.min(each, end - row);
    const data = await values(name, now.head * size + row * cols, count * cols);
    for (let i = 0; i < count; i++) {
      const at = row + i + skipped, numbers = [...data.subarray(i * cols, (i + 1) * cols)];
      lines.push(lineOf([at, ...perToken ? [quoted(tokenIds()[at] ?? at)] : [], ...numbers]));
    }
  }
  if (only !== null) say(new Error(`The CSV holds the chosen token's row alone: all ${size.toLocaleString("en")} `
    + "numbers would be too many for a table."));
  return lines;
}

async function saveTable(view) {
  try {
    const lines = view.table ? view.table().map(lineOf) : await matrixLines(view);
    save(new Blob(lines, {type: "text/csv"}), "csv");
  } catch (problem) { say(problem); }
}

// ---------------------------------------- the picture as it stands on the page

function texts(root, put) {  // each word with its box
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT), range = document.createRange();
  for (let node; (node = walker.nextNode());) {
    const {parentElement: parent} = node;
    if (!parent.checkVisibility() || ["OPTION", "SCRIPT"].includes(parent.tagName)) continue;
    for (const word of node.data.matchAll(/\S+/g)) {
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      const box = range.getBoundingClientRect();
      if (box.width) put(word[0], box, getComputedStyle(parent));
    }
  }
}

function backgrounds(one, pen, {x, y, width, height}) {
  const {backgroundColor, backgroundImage} = getComputedStyle(one);
  const stops = backgroundImage.match(/rgba?\([^)]+\) [\d.]+% [\d.]+%|rgba?\([^)]+\)(?: [\d.]+%)*/g) ?? [];
  if (!/, 0\)$/.test(backgroundColor)) {
    pen.fillStyle = backgroundColor;
    pen.fillRect(x, y, width, height);
  }
  stops.forEach((stop, i) => {
    pen.fillStyle = stop.match(/rgba?\([^)]+\)/)[0];
    pen.fillRect(x + i * width / stops.length, y, width / stops.length + .5, height);
  });
}

function drawLines(svg, pen, {x, y}) {
  for (const path of svg.querySelectorAll("path, line, polyline, circle")) {
    const {stroke, strokeWidth, opacity, fill} = getComputedStyle(path);
    const d = path.getAttribute("d");
    if (!d) continue;
    pen.save();
    pen.translate(x, y);
    pen.globalAlpha = +opacity;
    if (fill !== "none") { pen.fillStyle = fill; pen.fill(new Path2D(d)); }
    if (stroke !== "none") {
      pen.strokeStyle = stroke;
      pen.lineWidth = parseFloat(strokeWidth);
      pen.stroke(new Path2D(d));
    }
    pen.restore();
  }
}

function savePicture(view) {
  const root = $("picture");
  root.classList.add("whole");  // nothing scrolled out of sight, and no controls
  try { drawn(root, view).toBlob(blob => save(blob, "png"), "image/png"); } catch (problem) { say(problem); }
  root.classList.remove("whole");
}

function drawn(root, {name, shape, layout}) {
  const frame = root.getBoundingClientRect(), scale = Math.max(2, devicePixelRatio || 1), top = 26;
  const width = Math.max(frame.width, ...[...root.querySelectorAll("canvas, table")].map(one => one.getBoundingClientRect().width));
  const canvas = element("canvas", {width: (width + 16) * scale, height: (root.scrollHeight + top + 12) * scale});
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.fillStyle = css("--paper");
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.fillStyle = css("--ink");
  pen.font = "600 14px system-ui, sans-serif";
  const which = layout.n > 1 && !lookOf(name) ? `, ${matrixName(name, shape, now.head)}` : "";
  pen.fillText(`${name}${which}  (${isDifference() ? "first − second" : current().name})`, 8, 18);
  pen.translate(8 - frame.x, top - frame.y);
  for (const one of root.querySelectorAll("*")) {
    const box = one.getBoundingClientRect();
    if (!box.width || !one.checkVisibility()) continue;
    if (one.tagName === "CANVAS") {
      pen.imageSmoothingEnabled = false;
      pen.drawImage(one, box.x, box.y, box.width, box.height);
    } else if (one.tagName === "svg") drawLines(one, pen, box);
    else if (!one.closest("svg, select")) backgrounds(one, pen, box);
  }
  texts(root, (word, box, style) => {
    pen.font = `${style.fontWeight} ${style.fontSize} ${style.fontFamily}`;
    pen.fillStyle = style.color;
    pen.textBaseline = "middle";
    pen.fillText(word, box.x, box.y + box.height / 2);
  });
  return canvas;
}

// ---------------------------------------- what stands on the page

function reach() {
  const input = element("input", {value: now.reach, placeholder: "largest", size: 7, ariaLabel: "the colours reach up to",
    title: "a number, or the share of the numbers that the colours tell apart, such as 99%"});
  input.setAttribute("list", "reaches");
  input.onchange = () => {
    const wrong = reachOf(input.value) === null;
    input.ariaInvalid = wrong;
    if (wrong) readout(`${input.value}: the colours reach up to a number above 0, or a share such as 99%`);
    else choose({reach: input.value.trim()}, {keep: true});
  };
  const list = element("datalist", {id: "reaches"}, ...["99.9%", "99%", "95%"].map(value => element("option", {value})));
  return element("label", {}, "colours up to ", input, list);
}

const button = (words, title, onclick) => element("button", {title, ariaLabel: title, onclick}, words);
export function toolsOf(view) {
  const tools = [];
  if (view.ranged) tools.push(reach());
  if (view.zoom) tools.push(element("span", {role: "group", ariaLabel: "zoom"},
    button("+", "closer", () => view.zoom.by(.5)), button("−", "farther", () => view.zoom.by(2)),
    ...isZoomed(view.shape) ? [button("whole", "all of it", () => view.zoom.all())] : []));
  tools.push(element("span", {role: "group", ariaLabel: "save"},
    button("PNG", "save the picture as PNG", () => savePicture(view)),
    button("CSV", "save the numbers as CSV", () => saveTable(view))));
  return element("div", {id: "tools"}, ...tools);
}
