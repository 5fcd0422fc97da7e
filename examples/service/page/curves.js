// The curves of a training, a figure for each metric, as SVG.

import { drawn, element } from "./dom.js";
import { isOver, PHASES } from "./trainings.js";

const LEFT = 48, RIGHT = 12, TOP = 12, BOTTOM = 40, HEIGHT = 260;
const figures = document.querySelectorAll("figure");

export function drawCurves(training, redraw) {
  for (const figure of figures) {
    drawFigure(figure, training);
    figure.onpointermove = (event) => {
      figure.pointed = event.clientX - figure.getBoundingClientRect().left;
      redraw();
    };
    figure.onpointerleave = () => { figure.pointed = null; redraw(); };
  }
}

function drawFigure(figure, training) {
  const metric = figure.dataset.metric;
  const lines = PHASES.map((phase) => [phase, training.metrics[phase]?.[metric] || []]);
  const known = lines.flatMap(([, values]) => values).filter((value) => value != null);
  const width = Math.max(260, figure.clientWidth), epochs = Math.max(training.epochs, 2);
  const ticks = metric === "accuracy"
    ? ticksOf(Math.min(0.8, ...known), 1)
    : ticksOf(0, known.length ? Math.max(...known) : 1);
  const low = ticks[0], high = ticks.at(-1);
  const x = (epoch) => LEFT + ((epoch - 1) / (epochs - 1)) * (width - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - ((value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img",
    "aria-label": `${metric} of train and valid over the epochs` });
  drawAxes(svg, { x, y, width, epochs, ticks });
  if (!known.length)
    svg.append(drawn("text", { x: (LEFT + width - RIGHT) / 2, y: (HEIGHT - BOTTOM + TOP) / 2 + 4, class: "said" },
      isOver(training) ? "no epoch was finished" : "after the first epoch"));
  for (const [phase, values] of lines) drawLine(svg, phase, values, x, y);
  const best = training.best && lines[1][1][training.best.epoch - 1];
  if (best != null)
    svg.append(drawn("circle", { class: "best", r: 6, cx: x(training.best.epoch), cy: y(best) },
      drawn("title", {}, `best epoch: ${training.best.epoch}`)));
  let epoch = null;  // the one that is pointed to
  if (figure.pointed != null && known.length) {
    const nearest = 1 + Math.round(((figure.pointed - LEFT) / (width - LEFT - RIGHT)) * (epochs - 1));
    epoch = Math.min(Math.max(...lines.map(([, values]) => values.length)), Math.max(1, nearest));
    svg.append(drawn("line", { class: "cursor", x1: x(epoch), x2: x(epoch), y1: TOP, y2: HEIGHT - BOTTOM }));
  }
  figure.replaceChildren(captionOf(metric, lines, epoch, training.best), svg);
}

function captionOf(metric, lines, epoch, best) {  // with the values of an epoch, or the last ones
  const caption = element("figcaption", {}, element("b", {}, epoch ? `${metric}, epoch ${epoch}` : metric));
  for (const [phase, values] of lines) {
    const value = epoch ? values[epoch - 1] : values.at(-1);
    caption.append(element("span", { class: phase }, `${phase} `, element("i", {}, value?.toPrecision(3) ?? "")));
  }
  if (best && !epoch) caption.append(element("span", { class: "ring" }, "best"));
  return caption;
}

function drawAxes(svg, { x, y, width, epochs, ticks }) {
  const bottom = HEIGHT - BOTTOM;
  for (const tick of ticks)
    svg.append(drawn("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick) }),
      drawn("text", { x: LEFT - 8, y: y(tick) + 4, "text-anchor": "end" }, label(tick)));
  for (const tick of epochTicks(epochs, width))
    svg.append(drawn("line", { class: "axis", x1: x(tick), x2: x(tick), y1: bottom, y2: bottom + 4 }),
      drawn("text", { x: x(tick), y: bottom + 18, "text-anchor": "middle" }, tick));
  svg.append(drawn("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: bottom, y2: bottom }),
    drawn("text", { x: (LEFT + width - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, "epoch"));
}

function drawLine(svg, phase, values, x, y) {  // with a gap where there is no value
  const path = Array.from(values, (value, at) => value == null ? "" :
    `${at && values[at - 1] != null ? "L" : "M"}${x(at + 1).toFixed(1)} ${y(value).toFixed(1)}`).join("");
  svg.append(drawn("path", { class: `line ${phase}`, d: path }));
  if (values.at(-1) != null)
    svg.append(drawn("circle", { class: phase, r: 3, cx: x(values.length), cy: y(values.at(-1)) }));
}

function ticksOf(low, high) {  // four to seven round numbers that reach around both
  if (!(high > low)) high = low + 1;
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const ticks = [];
  for (let at = Math.floor(low / step + 1e-9); at * step < high + step * 0.999; at++) ticks.push(at * step);
  return ticks;
}

function epochTicks(epochs, width) {
  const most = Math.max(2, Math.floor(width / 60));
  const step = [1, 2, 5, 10, 20, 50, 100, 200, 500].find((size) => epochs / size <= most) || 1000;
  const ticks = [1];
  for (let at = step; at <= epochs; at += step) if (at > 1 && at - 1 >= step / 2) ticks.push(at);
  return ticks;
}

const label = (tick) => Math.abs(tick) >= 1e5 ? tick.toExponential(0) : Number(tick.toPrecision(6)).toString();
