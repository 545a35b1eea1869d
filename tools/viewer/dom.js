// Elements of the page, and numbers and texts as it shows them.

export const $ = id => document.getElementById(id);
export const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// A word or a number that can be clicked.
export const link = (text, onclick, properties = {}) =>
  element("button", {className: "link", onclick, ...properties}, text);

export function show(x) {
  if (Number.isNaN(x)) return "NaN";
  if (!Number.isFinite(x)) return x < 0 ? "−∞" : "∞";
  const size = Math.abs(x);
  const text = Number.isInteger(x) && size < 1e7 ? `${x}`
    : size < 1e-3 || size >= 1e5 ? x.toExponential(3) : x.toPrecision(4);
  return text.replaceAll("-", "−");
}

export const percent = (p, digits = 1) => `${(100 * p).toFixed(digits)}`;

export function cut(text, most = 13) {
  const letters = [...text];
  return letters.length > most ? letters.slice(0, most - 1).join("") + "…" : text;
}

export const readout = text => { $("readout").textContent = text; };

export function say(problem) {
  $("message").hidden = !problem;
  if (!problem) return;
  const gone = ["NotReadableError", "NotFoundError"].includes(problem.name);
  $("message").textContent = gone
    ? "The file can no longer be read. Has it changed or gone? Open it again."
    : problem.message ?? `${problem}`;
}
