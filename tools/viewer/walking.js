// Pictures for who does not point: each has a name, and its cells are walked with the arrows and read out.

import {css, readout} from "./dom.js";

const PAGE = 10;
let walked = [0, 0];  // row and column of the cell that was walked to, also in the picture that is drawn next

const STEPS = {  // from row, column, rows, columns to the next cell
  ArrowUp: ([i, j]) => [i - 1, j], ArrowDown: ([i, j]) => [i + 1, j],
  ArrowLeft: ([i, j]) => [i, j - 1], ArrowRight: ([i, j]) => [i, j + 1],
  Home: ([i]) => [i, 0], End: ([i], rows, cols) => [i, cols - 1],
  PageUp: ([i, j]) => [i - PAGE, j], PageDown: ([i, j]) => [i + PAGE, j],
};
const within = (x, n) => Math.max(0, Math.min(n - 1, x));

function framed(canvas) {  // frame(box) marks a cell, and takes away the mark of before
  let clean = null;
  return box => {
    const pen = canvas.getContext("2d");
    clean ??= Object.assign(document.createElement("canvas"), {width: canvas.width, height: canvas.height});
    if (!clean.dataset.kept) clean.getContext("2d").drawImage(canvas, 0, 0);
    clean.dataset.kept = "yes";
    pen.save();
    pen.resetTransform();
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.drawImage(clean, 0, 0);
    pen.restore();
    if (!box) return;
    const [x, y, wide, high] = box;
    pen.save();
    for (const [colour, line] of [["--paper", 4], ["--ink", 2]]) {
      pen.strokeStyle = css(colour);
      pen.lineWidth = line;
      pen.strokeRect(x - 1, y - 1, Math.max(4, wide) + 2, Math.max(4, high) + 2);
    }
    pen.restore();
  };
}

// label: what the picture shows. rows × cols cells; boxOf(row, col): [x, y, width, height] in the canvas's own
// pixels; tell(row, col): the words that are read out; pick(row, col), if there is one, chooses with Enter.
export function walkable(canvas, {label, rows, cols, boxOf, tell, pick}) {
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "application");  // so that a screen reader hands over the arrows
  canvas.setAttribute("aria-roledescription", "picture");
  canvas.ariaLabel = `${label}. Arrows go from cell to cell${pick ? ", Enter chooses" : ""}.`;
  const frame = framed(canvas);
  const here = () => [within(walked[0], rows), within(walked[1], cols)];
  const stand = () => {
    frame(boxOf(...here()));
    readout(tell(...here()));
  };
  canvas.addEventListener("focus", () => { if (canvas.matches(":focus-visible")) stand(); });
  canvas.addEventListener("blur", () => frame(null));
  canvas.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in STEPS) {
      const [i, j] = STEPS[event.key](here(), rows, cols);
      walked = [within(i, rows), within(j, cols)];
      stand();
    } else if (event.key === "Enter" && pick) pick(...here());
    else return;
    event.preventDefault();
    event.stopImmediatePropagation();
  });
}
