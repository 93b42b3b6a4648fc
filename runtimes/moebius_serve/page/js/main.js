// The page: what the buttons and keys do.

import { grown, inverted, pack, shrunk, unpack } from "./bits.js";
import { onDrop, onFile, onPaste, save } from "./files.js";
import { History } from "./history.js";
import { listen } from "./keys.js";
import { Mask, must } from "./mask.js";
import { Pictures } from "./pictures.js";
import { EngineError, ServerEngine } from "./server.js";
import { options, show, showFacts } from "./settings.js";
import { SiteEngine } from "./site/engine.js";
import { showStorage } from "./site/panel.js";
import { Stage } from "./stage.js";
import { keep, kept } from "./store.js";

/** @typedef {{blob: Blob, name: string, format: string}} Source `format`: what the result is wanted as; "": as it came */

/**
 * @typedef {object} Run what "another one" repeats
 * @property {Source} source
 * @property {Uint8Array} bits of the mask, see `pack`
 */
/**
 * @typedef {object} Moment what undo and redo go to
 * @property {Source} source
 * @property {Mask} mask
 * @property {{file: Blob, name: string} | null} result
 * @property {Source | null} was the picture before, to compare with
 * @property {Run | null} run
 */

/** @param {string} id @returns {any} */
const $ = (id) => must(document.getElementById(id));

const onSite = document.querySelector("meta[name=engine]")?.getAttribute("content") === "site";
const engine = onSite ? new SiteEngine() : new ServerEngine(askToken);
/** Shows how much of the model is stored, where the engine is a site's. */
let refreshStorage = () => {};
const stage = new Stage($("stage"), { changed: strokeEnded, clicked: (point) => void select(point) });
const changes = new History(refresh);
const pictures = new Pictures((blob, name) => engine.preview(blob, name));
/** @type {Source | null} what the picture is compared with */
let was = null;
/** @type {Source | null} */
let source = null;
/** @type {{file: Blob, name: string} | null} */
let result = null;
/** @type {Run | null} how the picture that is shown came about */
let lastRun = null;
/** @type {AbortController | null} */
let running = null;
let keeping = 0;

// State and words

/** @param {"empty" | "ready" | "running" | "done" | "error"} state @param {string} words */
function say(state, words) {
  document.body.dataset.state = state;
  $("status").textContent = words;
  refresh();
}

function refresh() {
  const busy = running !== null || changes.busy;
  const open = source !== null && !busy;
  $("run").disabled = !open;
  $("another").disabled = !open || lastRun === null;
  $("compare").disabled = !stage.before;
  $("download").disabled = result === null;
  $("undo").disabled = running !== null || changes.done.length === 0;
  $("redo").disabled = running !== null || changes.undone.length === 0;
  $("stage").setAttribute("aria-busy", String(busy));
  stage.frozen = busy; // no stroke on a picture that is about to go
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
  if (running || changes.busy) return;
  try {
    const opened = { blob, name, format: "" };
    const picture = await pictures.get(opened);
    take(opened, picture, new Mask(picture.width, picture.height));
    say("ready", `${name}: ${picture.width} × ${picture.height}. Paint over what should go, then press Run.`);
    remember();
  } catch (error) {
    fail(error);
  }
}

/** @param {Source} next @param {ImageBitmap} picture @param {Mask} mask */
function take(next, picture, mask) {
  source = next;
  result = lastRun = was = null;
  stage.before = null;
  compare(0);
  changes.clear();
  stage.show(picture, mask, true);
  pictures.release([picture]);
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
  if (!mask || running || changes.busy) return;
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
  if (stage.mask === mask) changeMask(() => values);
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

async function run() {
  const mask = stage.mask;
  if (!source || !mask || running || changes.busy) return;
  if (!mask.marked) {
    say("error", "Nothing is marked yet: paint over what should go.");
    return;
  }
  /** @type {Moment} */
  const before = { source, mask, result, was, run: lastRun };
  const made = { source, bits: pack(mask.values()) };
  running = new AbortController();
  compare(0);
  say("running", onSite ? "Starting…" : "Sending the picture…");
  $("progress").hidden = false;
  $("progress").removeAttribute("value");
  try {
    const filled = await engine.inpaint(before.source, await mask.toBlob(), options(), progress, running.signal);
    const ending = filled.picture.type === "image/tiff" ? "tif" : "png";
    const suffix = /\.(\w+)$/.exec(filled.name)?.[1] ?? "png";
    const format = before.source.format || suffix;
    const stem = before.source.name.replace(/\.\w+$/, "");
    const next = { blob: filled.picture, name: `${stem}.${ending}`, format };
    const shown = await pictures.get(next);
    /** @type {Moment} */
    const after = {
      source: next,
      mask: new Mask(shown.width, shown.height),
      result: { file: filled.file, name: filled.name.replace(/(-filled)+\./, "-filled.") },
      was: before.source,
      run: made,
    };
    await goTo(after);
    running = null;
    changes.push({ undo: () => goTo(before), redo: () => goTo(after) });
    showNotes(filled.notes);
    say("done", `Done, seed ${filled.seed}. Paint again to go on, or download the picture.`);
  } catch (error) {
    const cancelled = running?.signal.aborted;
    running = null;
    if (cancelled) say("ready", "Cancelled. The mask is still there.");
    else fail(error);
  } finally {
    $("progress").hidden = true;
    refresh();
    refreshStorage();
  }
}

/** Shows another moment. Nothing has changed where a picture cannot be decoded. @param {Moment} moment */
async function goTo(moment) {
  const picture = await pictures.get(moment.source);
  const before = moment.was && (await pictures.get(moment.was));
  if (stage.mask !== moment.mask) stage.mask?.fold();
  ({ source, result, was, run: lastRun } = moment);
  stage.before = before;
  compare(0);
  stage.show(picture, moment.mask, false);
  pictures.release([picture, before]);
  document.body.dataset.state = moment.result ? "done" : "ready";
  remember();
}

/** @param {"undo" | "redo"} way @param {boolean} held whether a key repeats itself: as fast as the changes go */
async function step(way, held = false) {
  if (running || (held && changes.busy)) return;
  try {
    await changes[way]();
  } catch (error) {
    fail(error);
  }
}

/** The region of the last run again, with another seed. */
async function another() {
  if (!lastRun || running || changes.busy) return;
  const { source: from, bits } = lastRun;
  const { width, height } = await pictures.get(from);
  const mask = new Mask(width, height);
  mask.set(unpack(bits, width * height));
  await goTo({ source: from, mask, result: null, was: null, run: null });
  $("seed").value = String(Math.floor(Math.random() * 2 ** 31));
  await run();
}

/** @param {import("./server.js").Progress} now */
function progress(now) {
  if (now.words) {
    $("progress").value = now.share ?? 0;
    say("running", now.words);
    return;
  }
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
  const left = { blob: work.blob, name: work.name, format: work.format };
  const picture = await pictures.get(left);
  take(left, picture, new Mask(picture.width, picture.height));
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

async function sample() {
  const answer = await fetch(new URL("../sample.jpg", import.meta.url));
  await open(await answer.blob(), "sample.jpg");
}

onFile($("open-file"), open, fail);
onFile($("camera"), open, fail);
onFile($("mask-file"), (file) => loadMask(file, false), fail);
onDrop($("stage"), open);
onPaste(open);
/** @type {Record<string, () => unknown>} */
const clicks = {
  sample: () => sample().catch(fail),
  download: () => result && save(result.file, result.name),
  undo: () => step("undo"),
  redo: () => step("redo"),
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
listen(stage, {
  keys,
  undo: (held) => step("undo", held),
  redo: (held) => step("redo", held),
  released: () => stage.split === 1 && compare(0),
});

// The start

async function start() {
  $("retry").hidden = true;
  try {
    show(await engine.describe());
  } catch (error) {
    $("retry").hidden = false;
    fail(error);
    return;
  }
  if (engine instanceof SiteEngine) {
    $("api").hidden = true;
    const done = (/** @type {string} */ words) => say(source ? "ready" : "empty", words);
    const loading = (/** @type {import("./server.js").Progress} */ now) => void ($("status").textContent = now.words ?? "");
    refreshStorage = showStorage(engine, { progress: loading, fail, done, about: showFacts });
  }
  await restore();
}

$("retry").addEventListener("click", () => void start().catch(fail));
refresh();
start().catch(fail);
