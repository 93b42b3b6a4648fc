// The page: what the buttons and keys do.

import { grown, inverted, pack, shrunk, unpack } from "./bits.js";
import { History } from "./history.js";
import { Mask, must } from "./mask.js";
import { EngineError, ServerEngine } from "./server.js";
import { Stage } from "./stage.js";
import { keep, kept } from "./store.js";

/** @typedef {{blob: Blob, name: string, format: string}} Source `format`: what the result is wanted as; "": as it came */

/**
 * @typedef {object} Run what "another one" repeats
 * @property {Source} source
 * @property {ImageBitmap} picture
 * @property {Uint8Array} bits of the mask, see `pack`
 */
/**
 * @typedef {object} Moment what undo and redo go to
 * @property {Source} source
 * @property {ImageBitmap} picture
 * @property {Mask} mask
 * @property {{file: Blob, name: string} | null} result
 * @property {ImageBitmap | null} was the picture before, to compare with
 * @property {Run | null} run
 */

/** @param {string} id @returns {any} */
const $ = (id) => must(document.getElementById(id));

const engine = new ServerEngine(askToken);
const stage = new Stage($("stage"), { changed: strokeEnded, clicked: (point) => void select(point) });
const changes = new History(refresh);
/** @type {Source | null} */
let source = null;
/** @type {{file: Blob, name: string} | null} */
let result = null;
/** @type {Run | null} how the picture that is shown came about */
let lastRun = null;
/** @type {AbortController | null} */
let running = null;
/** @type {any} */
let facts = null;
let keeping = 0;

// State and words

/** @param {"empty" | "ready" | "running" | "done" | "error"} state @param {string} words */
function say(state, words) {
  document.body.dataset.state = state;
  $("status").textContent = words;
  refresh();
}

function refresh() {
  const open = source !== null && running === null;
  $("run").disabled = !open;
  $("another").disabled = !open || lastRun === null;
  $("compare").disabled = !stage.before;
  $("download").disabled = result === null;
  $("undo").disabled = running !== null || changes.done.length === 0;
  $("redo").disabled = running !== null || changes.undone.length === 0;
  $("run").hidden = running !== null;
  $("cancel").hidden = running === null;
  for (const id of ["mask-save", "mask-invert", "mask-clear", "mask-grow", "mask-shrink"]) $(id).disabled = !open;
}

/** @param {unknown} error */
function fail(error) {
  say("error", error instanceof Error ? error.message : String(error));
}

// Pictures

/** @param {Blob} blob @param {string} name */
async function open(blob, name) {
  if (running) return;
  try {
    const picture = await decode(blob, name);
    take({ blob, name, format: "" }, picture, new Mask(picture.width, picture.height));
    say("ready", `${name}: ${picture.width} × ${picture.height}. Paint over what should go, then press Run.`);
    remember();
  } catch (error) {
    fail(error);
  }
}

/** @param {Blob} blob @param {string} name @returns {Promise<ImageBitmap>} upright, at full size */
async function decode(blob, name) {
  try {
    return await createImageBitmap(blob);
  } catch {
    return await createImageBitmap(await engine.preview(blob, name)); // TIFF, HEIC: the server's readers know more
  }
}

/** @param {Source} next @param {ImageBitmap} picture @param {Mask} mask */
function take(next, picture, mask) {
  source = next;
  result = lastRun = null;
  stage.before = null;
  compare(0);
  changes.clear();
  stage.show(picture, mask, true);
  $("notes").replaceChildren();
}

// Strokes

function strokeEnded() {
  const mask = stage.mask;
  const saved = mask?.end();
  if (!mask || !saved) return;
  let other = saved;
  const swap = () => {
    if (stage.mask === mask) {
      other = mask.restore(other);
      stage.draw("overlay");
      remember();
    }
  };
  changes.push({ undo: swap, redo: swap });
  remember();
  if ($("automatic").checked) void run();
}

/** @param {(values: Uint8Array, width: number) => Uint8Array} change of the whole mask */
function changeMask(change) {
  const mask = stage.mask;
  if (!mask || running) return;
  mask.begin();
  mask.set(change(mask.values(), mask.width));
  strokeEnded();
  stage.draw("overlay");
}

/** Marks what is white in a picture of the same size. @param {Blob} blob @param {boolean} add */
async function loadMask(blob, add) {
  const mask = stage.mask;
  if (!mask) throw new EngineError("Open a picture first; a mask belongs to it.");
  const drawn = await createImageBitmap(blob);
  if (drawn.width !== mask.width || drawn.height !== mask.height) {
    throw new EngineError(
      `The mask is ${drawn.width} × ${drawn.height} and the picture ${mask.width} × ${mask.height}; they must agree.`,
    );
  }
  const canvas = document.createElement("canvas");
  canvas.width = mask.width;
  canvas.height = mask.height;
  const context = must(canvas.getContext("2d", { willReadFrequently: true }));
  context.drawImage(drawn, 0, 0);
  const data = context.getImageData(0, 0, mask.width, mask.height).data;
  const values = add ? mask.values() : new Uint8Array(mask.width * mask.height);
  for (let i = 0; i < values.length; i++) {
    const luma = 0.299 * data[4 * i] + 0.587 * data[4 * i + 1] + 0.114 * data[4 * i + 2];
    if (luma >= 127.5 && data[4 * i + 3] >= 128) values[i] = 1;
  }
  changeMask(() => values);
}

/** @param {{x: number, y: number}} point */
async function select(point) {
  if (!source || running) return;
  try {
    say("ready", "Looking for the object…");
    const found = await engine.select(source.blob, source.name, [[Math.round(point.x), Math.round(point.y), 1]]);
    await loadMask(found, true);
    say("ready", "Selected. Click again to add, or press Run.");
  } catch (error) {
    fail(error);
  }
}

// Running

function options() {
  /** @param {string} id */
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  const grow = $("dilate").value.trim();
  return {
    mode: $("mode").value || undefined,
    steps: number("steps"),
    guidance_scale: number("guidance"),
    seed: number("seed") ?? 0,
    blend: $("blend").value || undefined,
    mask_dilate: grow === "" ? undefined : grow === "auto" ? "auto" : Number(grow),
  };
}

async function run() {
  const mask = stage.mask;
  if (!source || !mask || running) return;
  if (!mask.marked) {
    say("error", "Nothing is marked yet: paint over what should go.");
    return;
  }
  const picture = /** @type {ImageBitmap} */ (stage.picture);
  /** @type {Moment} */
  const before = { source, picture, mask, result, was: stage.before, run: lastRun };
  const made = { source, picture, bits: pack(mask.values()) };
  running = new AbortController();
  stage.frozen = true;
  compare(0);
  say("running", "Sending the picture…");
  $("progress").hidden = false;
  $("progress").removeAttribute("value");
  try {
    const filled = await engine.inpaint(before.source, await mask.toBlob(), options(), progress, running.signal);
    const ending = filled.picture.type === "image/tiff" ? "tif" : "png";
    const shown = await decode(filled.picture, `result.${ending}`);
    const suffix = /\.(\w+)$/.exec(filled.name)?.[1] ?? "png";
    const format = before.source.format || suffix;
    const stem = before.source.name.replace(/\.\w+$/, "");
    /** @type {Moment} */
    const after = {
      source: { blob: filled.picture, name: `${stem}.${ending}`, format },
      picture: shown,
      mask: new Mask(shown.width, shown.height),
      result: { file: filled.file, name: filled.name.replace(/(-filled)+\./, "-filled.") },
      was: before.picture,
      run: made,
    };
    running = null;
    goTo(after);
    changes.push({ undo: () => goTo(before), redo: () => goTo(after) });
    showNotes(filled.notes);
    say("done", `Done, seed ${filled.seed}. Paint again to go on, or download the picture.`);
  } catch (error) {
    const cancelled = running?.signal.aborted;
    running = null;
    if (cancelled) say("ready", "Cancelled. The mask is still there.");
    else fail(error);
  } finally {
    stage.frozen = false;
    $("progress").hidden = true;
    refresh();
  }
}

/** @param {Moment} moment */
function goTo(moment) {
  source = moment.source;
  result = moment.result;
  lastRun = moment.run;
  stage.before = moment.was;
  compare(0);
  stage.show(moment.picture, moment.mask, false);
  document.body.dataset.state = moment.result ? "done" : "ready";
  remember();
}

/** The region of the last run again, with another seed. */
async function another() {
  if (!lastRun || running) return;
  const { source: from, bits, picture } = lastRun;
  const mask = new Mask(picture.width, picture.height);
  mask.set(unpack(bits, picture.width * picture.height));
  goTo({ source: from, picture, mask, result: null, was: null, run: null });
  $("seed").value = String(Math.floor(Math.random() * 2 ** 31));
  await run();
}

/** @param {import("./server.js").Progress} now */
function progress(now) {
  if (now.state === "queued") {
    say("running", now.position ? `Waiting: ${now.position} before this one.` : "Waiting…");
    return;
  }
  const share = now.steps ? now.step / now.steps : 0;
  if (now.steps) $("progress").value = share;
  const left = now.seconds_left === null ? "" : `, about ${time(now.seconds_left)} left`;
  say("running", now.steps ? `Step ${now.step} of ${now.steps}${left}.` : "Reading the picture…");
}

/** @param {number} seconds */
function time(seconds) {
  return seconds < 90 ? `${Math.max(1, Math.round(seconds))} s` : `${Math.round(seconds / 60)} min`;
}

/** @param {string[]} notes */
function showNotes(notes) {
  $("notes").replaceChildren(
    ...notes.map((note) => {
      const item = document.createElement("li");
      item.textContent = note;
      return item;
    }),
  );
}

// Comparing, saving, keeping

/** @param {number} split share of the width that shows the picture before */
function compare(split) {
  stage.split = stage.before ? split : 0;
  const sliding = stage.split > 0 && stage.split < 1;
  $("compare").setAttribute("aria-pressed", String(sliding));
  $("compare-slider").hidden = !sliding;
  stage.draw("both");
}

/** @param {Blob} blob @param {string} name */
function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** Keeps the picture and its mask for a reload, a moment after the last change. */
function remember() {
  const number = ++keeping;
  document.body.dataset.kept = "no";
  setTimeout(async () => {
    if (number !== keeping || !source || !stage.mask) return;
    await keep({ ...source, mask: await stage.mask.toBlob(), result });
    if (number === keeping) document.body.dataset.kept = "yes";
  }, 300);
}

async function restore() {
  const work = await kept();
  if (!work || source) return;
  const picture = await decode(work.blob, work.name);
  take({ blob: work.blob, name: work.name, format: work.format }, picture, new Mask(picture.width, picture.height));
  await loadMask(work.mask, false);
  changes.clear();
  result = work.result;
  say(result ? "done" : "ready", `${work.name} and its mask, as you left them.`);
}

/** @returns {Promise<string>} */
function askToken() {
  return new Promise((resolve) => {
    const dialog = /** @type {HTMLDialogElement} */ ($("token-dialog"));
    dialog.addEventListener("close", () => resolve($("token").value), { once: true });
    if (!dialog.open) dialog.showModal();
  });
}

// Buttons

/** @param {import("./stage.js").Tool} tool */
function choose(tool) {
  stage.tool = tool;
  for (const button of document.querySelectorAll("[data-tool]")) {
    button.setAttribute("aria-pressed", String(button.getAttribute("data-tool") === tool));
  }
  $("stage").style.cursor = tool === "pan" ? "grab" : "crosshair";
  stage.draw("overlay");
}

/** @param {number} size */
function brush(size) {
  stage.size = Math.min(400, Math.max(1, Math.round(size)));
  $("brush-size").value = String(stage.size);
  $("size-shown").textContent = String(stage.size);
  stage.draw("overlay");
}

/** @param {string} id @param {(file: File) => Promise<void>} use */
function onFile(id, use) {
  $(id).addEventListener("change", async () => {
    const [file] = $(id).files;
    $(id).value = "";
    if (file) await use(file).catch(fail);
  });
}

async function sample() {
  const answer = await fetch("/page/sample.jpg");
  await open(await answer.blob(), "sample.jpg");
}

onFile("open-file", (file) => open(file, file.name));
onFile("camera", (file) => open(file, file.name));
onFile("mask-file", (file) => loadMask(file, false));
/** @type {Record<string, () => unknown>} */
const clicks = {
  sample: () => sample().catch(fail),
  download: () => result && save(result.file, result.name),
  undo: () => changes.undo(),
  redo: () => changes.redo(),
  "zoom-in": () => stage.zoom(1.25),
  "zoom-out": () => stage.zoom(0.8),
  "zoom-fit": () => stage.fit(),
  run,
  cancel: () => running?.abort(),
  another,
  compare: () => compare(stage.split > 0 ? 0 : Number($("compare-slider").value) / 1000),
  "mask-save": async () => stage.mask && save(await stage.mask.toBlob(), "mask.png"),
  "mask-invert": () => changeMask(inverted),
  "mask-clear": () => changeMask((values) => new Uint8Array(values.length)),
  "mask-grow": () => changeMask((values, width) => grown(values, width, 4)),
  "mask-shrink": () => changeMask((values, width) => shrunk(values, width, 4)),
  "about-open": () => $("about").showModal(),
};
for (const [id, click] of Object.entries(clicks)) $(id).addEventListener("click", click);
for (const button of document.querySelectorAll("[data-tool]")) {
  button.addEventListener("click", () => choose(/** @type {any} */ (button.getAttribute("data-tool"))));
}
$("brush-size").addEventListener("input", () => brush(Number($("brush-size").value)));
$("stage").addEventListener("brushsize", (/** @type {CustomEvent} */ event) => brush(stage.size * event.detail));
$("compare-slider").addEventListener("input", () => {
  stage.split = Math.min(0.999, Math.max(0.001, Number($("compare-slider").value) / 1000));
  stage.draw("picture");
});

// Keys

/** @type {Record<string, () => unknown>} */
const keys = {
  Enter: run,
  Escape: () => running?.abort(),
  b: () => choose("brush"),
  e: () => choose("eraser"),
  l: () => choose("line"),
  s: () => choose("lasso"),
  r: () => choose("rectangle"),
  "[": () => brush(stage.size / 1.15 - 0.5),
  "]": () => brush(stage.size * 1.15 + 0.5),
  "+": () => stage.zoom(1.25),
  "-": () => stage.zoom(0.8),
  0: () => stage.fit(),
  p: () => stage.dab(),
  c: () => compare(1),
  " ": () => (stage.space = true),
};
const STEPS = { ArrowLeft: [-10, 0], ArrowRight: [10, 0], ArrowUp: [0, -10], ArrowDown: [0, 10] };

document.addEventListener("keydown", (event) => {
  const target = /** @type {HTMLElement} */ (event.target);
  const typing = target.matches("input:not([type=range]):not([type=checkbox]), select, textarea");
  if (document.querySelector("dialog[open]") || typing) return;
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z") {
    event.preventDefault();
    if (running) return;
    if (event.shiftKey) changes.redo();
    else changes.undo();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const onButton = target.matches("button, summary, a, label, input");
  if (onButton && (event.key === "Enter" || event.key === " ")) return; // the button's own
  const step = STEPS[/** @type {keyof typeof STEPS} */ (event.key)];
  if (step && target === $("stage")) {
    event.preventDefault();
    const far = event.shiftKey ? 5 : 1;
    stage.nudge(step[0] * far, step[1] * far);
    return;
  }
  const action = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action || (event.repeat && event.key === "c")) return;
  event.preventDefault();
  void action();
});
document.addEventListener("keyup", (event) => {
  if (event.key === " ") stage.space = false;
  if (event.key.toLowerCase() === "c" && stage.split === 1) compare(0);
});

// Drop and paste

$("stage").addEventListener("dragover", (/** @type {DragEvent} */ event) => {
  event.preventDefault();
  $("stage").classList.add("drop");
});
$("stage").addEventListener("dragleave", () => $("stage").classList.remove("drop"));
$("stage").addEventListener("drop", (/** @type {DragEvent} */ event) => {
  event.preventDefault();
  $("stage").classList.remove("drop");
  const file = event.dataTransfer?.files[0];
  if (file) void open(file, file.name);
});
document.addEventListener("paste", (event) => {
  const file = event.clipboardData?.files[0];
  if (file) void open(file, file.name || "pasted.png");
});

// The start

/** Shows how many steps the chosen mode takes where none are given. */
function showSteps() {
  $("steps").placeholder = String(facts.mode_steps?.[$("mode").value] ?? facts.defaults.num_inference_steps);
}

async function start() {
  facts = await engine.describe();
  for (const mode of facts.modes) {
    const option = document.createElement("option");
    option.value = option.textContent = mode;
    $("mode").append(option);
  }
  $("mode").value = facts.mode;
  showSteps();
  $("mode").addEventListener("change", showSteps);
  $("guidance").placeholder = String(facts.defaults.guidance_scale);
  document.querySelector("[data-tool=select]")?.toggleAttribute("hidden", !facts.segmenter);
  const rows = { model: facts.model, ...facts.runtime, "weights": facts.test_weights ? "random test weights" : "trained" };
  $("facts").replaceChildren(
    ...Object.entries(rows).flatMap(([name, value]) => {
      const term = document.createElement("dt");
      const text = document.createElement("dd");
      term.textContent = name;
      text.textContent = String(value);
      return [term, text];
    }),
  );
  await restore();
}

refresh();
start().catch(fail);
