// Elements and texts of the page.

export const $ = (id) => document.getElementById(id);

export const element = (name, attributes, ...children) =>
  filled(document.createElement(name), attributes, children);

export const drawn = (name, attributes, ...children) =>
  filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

function filled(made, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

export function say(where, text) {  // an element without a text is hidden
  where.hidden = !text;
  if (where.textContent !== text) where.textContent = text || "";
}

export function setBar(bar, training, part) {  // the policy of the page allows no style attribute
  bar.className = `bar ${training.status}`;
  bar.firstElementChild.style.width = `${100 * part}%`;
}

export const percent = (share) => `${(100 * share).toFixed(1)}%`;
export const counted = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
export const rounded = (value) => Math.abs(value) >= 1e5 ? value.toExponential(2) : `${Number(value.toPrecision(3))}`;
export const clock = (seconds) =>
  `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;

export function duration(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}
