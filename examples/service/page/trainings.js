// The trainings of the service, as its events tell them.

export const PHASES = ["train", "valid"];
export const trainings = new Map();  // id -> training
export const connection = { state: "", text: "connecting", openedAt: Date.now() };

const OVER = ["done", "failed", "cancelled", "interrupted"];
let service = null;   // the run of the service that the trainings are from
let clockAhead = 0;   // seconds by which the clock here is ahead of the service's

export const isOver = (training) => OVER.includes(training.status);
export const secondsUntil = (time) => Math.max(0, time - Date.now() / 1000 + clockAhead);

// Calls `changed` after every change, and `returned` when the connection is there (again).
export function follow(changed, returned) {
  const events = new EventSource("/events");
  events.onopen = () => {
    Object.assign(connection, { state: "open", text: "live", openedAt: Date.now() });
    returned();
    changed();
  };
  events.onerror = () => {
    Object.assign(connection, { state: "lost", text: "connection lost, trying again" });
    changed();
    if (events.readyState === EventSource.CLOSED) setTimeout(() => follow(changed, returned), 2000);
  };
  events.onmessage = (message) => {
    apply(JSON.parse(message.data));
    changed();
  };
}

function apply(event) {
  if (event.kind === "hello") {
    if (!event.goes_on || event.service !== service) trainings.clear();
    service = event.service;
    clockAhead = Date.now() / 1000 - event.time;
  } else if (event.kind === "submitted") {
    trainings.set(event.id, event);
  } else {
    const training = trainings.get(event.training);
    if (training) CHANGES[event.kind]?.(training, event);
  }
}

const CHANGES = {  // kind of the event -> what it changes
  job_started: (training) => { training.status = "running"; },
  batch_progress: (training, event) => {
    training.progress = event;
    if (event.phase === "train") training.live = event;
  },
  epoch_ended: (training, event) => {
    training.epoch = Math.max(training.epoch, event.epoch);  // a resumed training may repeat one
    training.epochSeconds = event.seconds;
    training.progress = training.note = null;
    for (const phase of PHASES)
      for (const [name, value] of Object.entries(event.metrics[phase] || {}))
        ((training.metrics[phase] ||= {})[name] ||= [])[event.epoch - 1] = value;
  },
  best_improved: (training, event) => { training.best = event; },
  prompt_asked: (training, event) => { training.question = event; training.answered = false; },
  prompt_expired: (training, event) => {
    training.note = `Nobody answered after epoch ${event.epoch}, so the training went on.`;
  },
  prompt_answered: (training) => { training.question = training.problem = null; },
  cancelling: (training) => { training.cancelling = true; },
  over: (training, event) => {
    Object.assign(training, event, { metrics: training.metrics, problem: null, note: null });
  },
};

export function epochsDone(training) {  // with the part of the present one
  const at = training.progress;
  if (!at?.batches || at.epoch <= training.epoch) return training.epoch;
  return training.epoch + (at.batch / at.batches) * (at.phase === "train" ? 0.9 : 1);
}

export function secondsLeft(training) {  // null if nobody knows
  const at = training.progress;
  if (training.status !== "running" || training.question) return null;
  let epochSeconds = training.epochSeconds;
  if (!epochSeconds && at?.batches && at.phase === "train")
    epochSeconds = (at.seconds / at.batch) * at.batches / 0.9;
  return epochSeconds ? epochSeconds * (training.epochs - epochsDone(training)) : null;
}
