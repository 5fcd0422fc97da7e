// What the page shows, and what people do. The training at /#/7 is the one with the number 7.

import { drawCurves } from "./curves.js";
import { $, clock, counted, duration, element, percent, rounded, say, setBar } from "./dom.js";
import { connection, epochsDone, follow, isOver, secondsLeft, secondsUntil, trainings } from "./trainings.js";

const chosenId = () => Number(location.hash.match(/^#\/(\d{1,15})$/)?.[1] ?? NaN);
const chosen = () => trainings.get(chosenId());

// -- what people do ----------------------------------------------------------------------------

async function send(method, path, body) {
  const options = { method };
  if (body !== undefined) {
    options.headers = { "Content-Type": "application/json" };
    options.body = JSON.stringify(body);
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    return { problems: [{ field: "", message: "The service does not answer. Is it running?" }] };
  }
  const told = await answer.json().catch(() => null);
  if (answer.ok) return told;
  return { problems: told?.problems || [{ field: "", message: `The service answered ${answer.status}.` }] };
}

$("form").onsubmit = async (event) => {
  event.preventDefault();
  const form = event.target, button = form.querySelector("button");
  const { name, model, ...numbers } = Object.fromEntries(new FormData(form));
  for (const [key, text] of Object.entries(numbers))  // the service says what is wrong with a text
    if (text.trim() !== "" && Number.isFinite(Number(text))) numbers[key] = Number(text);
  button.disabled = true;
  const told = await send("POST", "/trainings", { name, model, ...numbers });
  button.disabled = false;
  showProblems(form, told.problems || []);
  if (!told.problems) location.hash = `#/${told.id}`;
};

function showProblems(form, problems) {
  form.querySelectorAll("label .problem").forEach((old) => old.remove());
  form.querySelectorAll("[aria-invalid]").forEach((field) => field.removeAttribute("aria-invalid"));
  const rest = [];
  for (const { field, message } of problems) {
    const input = field && form.elements[field];
    if (!input) { rest.push(message); continue; }
    input.setAttribute("aria-invalid", "true");
    input.closest("label").append(element("span", { class: "problem", role: "alert" }, message));
  }
  say($("form-problem"), rest.join(" "));
  form.querySelector("[aria-invalid]")?.focus();
}

async function act(training, method, path, body) {
  draw();
  const told = await send(method, `/trainings/${training.id}${path}`, body);
  if (told.problems) {
    training.problem = told.problems.map((problem) => problem.message).join(" ");
    training.answered = training.cancelling = training.resuming = false;
  }
  draw();
}

function answerWith(goOn) {
  const training = chosen();
  if (!training?.question) return;  // answered elsewhere just now
  training.answered = true;  // a second click would be for the next question
  act(training, "POST", "/answer", { epoch: training.question.epoch, go_on: goOn });
}

$("yes").onclick = () => answerWith(true);
$("no").onclick = () => answerWith(false);
$("cancel").onclick = () => {
  const training = chosen();
  training.cancelling = true;
  act(training, "DELETE", "");
};

$("resume").onclick = () => {
  const training = chosen();
  training.resuming = true;  // until the service tells it anew
  act(training, "POST", "/resume");
};

function forgetProblems() {  // the service is there again
  say($("form-problem"), "");
  for (const training of trainings.values()) training.problem = null;
}

// -- what is shown -----------------------------------------------------------------------------

let isDrawing = false;

// The service tells its trainings one after the other, so the chosen one may come in a moment.
const isLoading = () => chosenId() && Date.now() < connection.openedAt + 1000;

function draw() {  // at most once a frame, however fast events come
  if (isDrawing) return;
  isDrawing = true;
  requestAnimationFrame(() => {
    isDrawing = false;
    $("connection").className = connection.state;
    $("connection").textContent = connection.text;
    drawList();
    const training = chosen();
    document.title = training ? `${training.name} #${training.id}: fitloop` : "fitloop: trainings";
    document.body.classList.toggle("chosen", Boolean(training));
    $("detail").hidden = !training;
    $("nothing").hidden = Boolean(training) || isLoading();
    if (training) drawDetail(training);
    else drawNothing();
  });
}

function drawNothing() {
  const [title, text] = nothingIsShownBecause();
  say($("nothing-title"), title);
  say($("nothing-text"), text);
}

function nothingIsShownBecause() {
  if (connection.state === "lost")
    return ["The service does not answer", "This page tries again every second or so, and goes on by itself."];
  if (chosenId()) return [`There is no training ${chosenId()}`, "Choose another one in the list, or start one."];
  if (trainings.size) return ["No training is chosen", "Choose one in the list, or start one."];
  return ["No training yet", "Choose a model and a learning rate, and start one. Its curves are drawn here."];
}

function stateOf(training) {  // class and text of the badge
  if (isOver(training)) return [training.status, training.status];
  if (training.question) return ["asks", "asks"];
  return training.cancelling ? ["waiting", "cancelling"] : [training.status, training.status];
}

const rows = new Map();  // id -> its row in the list

function drawList() {
  $("list-card").hidden = trainings.size === 0;
  for (const [id, row] of rows)
    if (!trainings.has(id)) { row.remove(); rows.delete(id); }
  for (const training of trainings.values()) {
    if (!rows.has(training.id)) {
      const row = $("row").content.firstElementChild.cloneNode(true);
      row.firstElementChild.href = `#/${training.id}`;
      rows.set(training.id, row);
      $("list").prepend(row);
    }
    drawRow(rows.get(training.id).firstElementChild, training);
  }
}

function drawRow(row, training) {
  const [kind, word] = stateOf(training);
  if (training.id === chosenId()) row.setAttribute("aria-current", "page");
  else row.removeAttribute("aria-current");
  const [name, badge, model, score, bar] = row.children;
  say(name, training.name);
  badge.className = `badge ${kind}`;
  say(badge, word);
  say(model, `#${training.id}, ${training.model}, lr ${training.lr}`);
  say(score, training.best ? `best ${percent(training.best.score)}` : " ");
  setBar(bar, training, epochsDone(training) / training.epochs);
}

function drawDetail(training) {
  const [kind, word] = stateOf(training), part = epochsDone(training) / training.epochs;
  say($("name"), training.name);
  say($("number"), `#${training.id}`);
  $("badge").className = `badge ${kind}`;
  say($("badge"), word);
  $("cancel").hidden = isOver(training);
  $("cancel").disabled = Boolean(training.cancelling);
  $("cancel").textContent = training.cancelling ? "Cancelling…" : "Cancel";
  $("resume").hidden = !["cancelled", "failed"].includes(training.status);
  $("resume").disabled = Boolean(training.resuming);
  $("weights").hidden = !training.weights;
  $("weights").href = training.weights || "";
  say($("at"), whereIs(training));
  say($("settings"), `${training.model}, lr ${training.lr}`);
  setBar($("bar"), training, part);
  $("bar").setAttribute("aria-valuenow", (100 * part).toFixed(0));
  drawQuestion(training);
  say($("error"), training.problem || training.error);
  say($("note"), training.note);
  const facts = factsOf(training).map(([term, fact]) =>
    element("div", {}, element("dt", {}, term), element("dd", {}, fact)));
  $("facts").hidden = facts.length === 0;
  $("facts").replaceChildren(...facts);
  drawCurves(training, draw);
}

function drawQuestion(training) {
  const { question } = training;
  $("asked").hidden = !question || isOver(training);
  if ($("asked").hidden) return;
  say($("question"), `Train the other ${counted(training.epochs - question.epoch, "epoch")}, too?`);
  say($("countdown"), question.until && `It goes on without an answer in ${clock(secondsUntil(question.until))}.`);
  $("yes").disabled = $("no").disabled = Boolean(training.answered);
}

function whereIs(training) {
  if (training.status === "waiting") return waitsFor(training);
  if (training.status === "interrupted") return "interrupted; it goes on when the service is started again";
  if (isOver(training) || training.question)
    return `${training.epoch} of ${counted(training.epochs, "epoch")} trained`;
  const at = training.progress, left = secondsLeft(training);
  let text = `epoch ${Math.min(training.epoch + 1, training.epochs)} of ${training.epochs}`;
  if (at?.epoch > training.epoch) text += `, ${at.phase} batch ${at.batch}${at.batches ? ` of ${at.batches}` : ""}`;
  return left === null ? text : `${text}, about ${duration(left)} left`;
}

function waitsFor(training) {
  const all = [...trainings.values()];
  const running = all.filter((one) => one.status === "running");
  const before = all.filter((one) => one.status === "waiting" && one.id < training.id);
  if (!running.length) return "starts soon";
  const text = `waits until one of these ends: ${running.map(nameAndTime).join(", ")}`;
  return before.length ? `${text}; ${counted(before.length, "other")} before it` : text;
}

function nameAndTime(training) {
  const name = `#${training.id} ${training.name}`, left = secondsLeft(training);
  if (training.question) return `${name} (asks whether to go on)`;
  return left === null ? name : `${name} (about ${duration(left)} left)`;
}

const REASONS = { completed: "all epochs trained", prompt: "ended at the question", stopped: "stopped" };

function factsOf(training) {
  const { best, live, result } = training, facts = [];
  if (result) facts.push(["Result", REASONS[result.stop_reason] || result.stop_reason]);
  if (best)
    facts.push([result ? "Best accuracy" : "Best accuracy so far", `${percent(best.score)} in epoch ${best.epoch}`]);
  if (live && training.status === "running" && !training.question) {
    if (live.metrics.loss != null) facts.push([`Train loss in epoch ${live.epoch}`, rounded(live.metrics.loss)]);
    const rates = Object.values(live.learning_rates);
    if (rates.length) facts.push(["Learning rate", rates.map(rounded).join(", ")]);
  }
  if (result) facts.push(["Training time", duration(result.seconds)]);
  return facts;
}

// -- start -------------------------------------------------------------------------------------

addEventListener("hashchange", () => { scrollTo(0, 0); draw(); });
addEventListener("resize", draw);
setInterval(draw, 1000);  // for the clocks
follow(draw, forgetProblems);
if (!location.hash) {  // show the newest one, and stay with it
  const all = await send("GET", "/trainings");
  if (all.length && !location.hash) location.replace(`#/${all.at(-1).id}`);
}
