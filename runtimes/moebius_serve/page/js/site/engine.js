// The engine inside the browser: the same interface to the page as the server's (../server.js).

import { EngineError } from "../server.js";
import { megabytes } from "./storage.js";

/** @typedef {import("../server.js").Progress} Progress */
/** @typedef {{id: number, resolve: (value: any) => void, reject: (error: Error) => void, progress: (now: any) => void}} Call */

const SCHEMA = 1;
const CHOICE = "moebius-run-on"; // in this browser's local storage
const UNTRIED =
  "WebGPU has been run on a software adapter (SwiftShader) only. No real GPU, and no browser other than Chromium, has run this page.";
/** @type {Record<string, string>} */
const TYPES = { jpg: "image/jpeg", jpeg: "image/jpeg", webp: "image/webp" };

export class SiteEngine {
  constructor() {
    this.root = new URL("../../../", import.meta.url);
    /** @type {Worker | null} */
    this.worker = null;
    /** @type {Map<number, Call>} */
    this.calls = new Map();
    this.count = 0;
    /** @type {any} */
    this.site = null;
    /** @type {"webgpu" | "wasm"} */
    this.provider = "wasm";
  }

  /** What the site holds, and what it will run on. @returns {Promise<any>} */
  async describe() {
    const answer = await fetch(new URL("site.json", this.root), { cache: "no-cache" }).catch(() => null);
    if (!answer?.ok) throw new EngineError(`The site's description cannot be read (${answer?.status ?? "no answer"}).`);
    const site = await answer.json().catch(() => ({}));
    if (site.schema_version !== SCHEMA || site.manifest?.schema_version !== 1) {
      throw new EngineError(
        `The site's files are of schema ${site.schema_version ?? "unknown"}, and this page reads ${SCHEMA}. Reload ` +
          "the page; if it stays so, export the site again.",
      );
    }
    this.site = site;
    const { provider, words } = await choice(site.precision, chosen());
    this.provider = provider;
    const defaults = site.manifest.defaults;
    return {
      model: site.model,
      test_weights: site.test_weights,
      runtime: {
        "runs on": words,
        precision: site.precision,
        download: megabytes(site.size),
        "onnxruntime-web": site.onnxruntime_web,
        "not yet tried": UNTRIED,
      },
      modes: Object.keys(site.mode_steps),
      mode: site.mode,
      mode_steps: site.mode_steps,
      segmenter: null,
      defaults,
      engine: words,
    };
  }

  /** Chooses what the next runs compute on, and keeps the choice. @param {string} provider "wasm", or "" for the best */
  async runOn(provider) {
    try {
      localStorage.setItem(CHOICE, provider);
    } catch {
      throw new EngineError("This browser keeps no settings for this page, so the choice cannot be kept.");
    }
    return this.describe();
  }

  /** @param {Blob} _file @param {string} name @returns {Promise<Blob>} */
  async preview(_file, name) {
    throw new EngineError(`This browser cannot read ${name}. Convert it to PNG or JPEG, then open it again.`);
  }

  /** @returns {Promise<Blob>} */
  async select() {
    throw new EngineError("Selecting an object by a click needs moebius-serve with --segmenter.");
  }

  /** Bytes of the model that this browser stores, and of the whole. @returns {Promise<{stored: number, total: number}>} */
  stored() {
    return this.#call("stored");
  }

  /** @param {(progress: Progress) => void} onProgress */
  async download(onProgress) {
    await this.#call("download", undefined, (now) => onProgress(loading("the model", now)));
  }

  async clear() {
    await this.#call("clear");
  }

  /**
   * @param {{blob: Blob, name: string, format: string}} source
   * @param {Blob} mask white is filled
   * @param {Record<string, unknown>} options
   * @param {(progress: Progress) => void} onProgress
   * @param {AbortSignal} signal
   * @returns {Promise<import("../server.js").Filled>}
   */
  async inpaint(source, mask, options, onProgress, signal) {
    const image = await pixelsOf(source.blob);
    const marked = await pixelsOf(mask);
    const area = new Uint8Array(marked.width * marked.height);
    for (let i = 0; i < area.length; i++) area[i] = marked.data[4 * i] > 127 && marked.data[4 * i + 3] > 127 ? 255 : 0;
    const given = Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined));
    const argument = {
      provider: this.provider,
      image: { data: image.data, width: image.width, height: image.height },
      mask: { data: area, width: marked.width, height: marked.height },
      options: given,
    };
    let first = 0;
    const progress = (/** @type {any} */ now) => {
      if (now.graph) return onProgress(now.loaded ? loading(now.graph, now.loaded) : checking(now.graph));
      if (!first && now.step) first = performance.now();
      const each = now.step > 1 ? (performance.now() - first) / (now.step - 1) / 1000 : null;
      const left = each === null ? null : each * (now.steps - now.step);
      onProgress({ state: "running", position: 0, step: now.step, steps: now.steps, seconds_left: left });
    };
    const filled = await this.#call("inpaint", argument, progress, signal);
    const canvas = new OffscreenCanvas(filled.width, filled.height);
    const context = /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext("2d"));
    context.putImageData(new ImageData(filled.data, filled.width, filled.height), 0, 0);
    const picture = await canvas.convertToBlob({ type: "image/png" });
    const suffix = (source.format || /\.(\w+)$/.exec(source.name)?.[1] || "png").toLowerCase();
    const type = TYPES[suffix];
    const own = type ? await canvas.convertToBlob({ type, quality: 0.95 }) : picture;
    const file = own.type === type ? own : picture; // a browser that does not write this format gives PNG
    const notes = [...filled.notes];
    if (image.data.some((value, i) => i % 4 === 3 && value > 0 && value < 255)) {
      notes.push("half transparent pixels can differ by rounding: this browser stores their colours premultiplied");
    }
    notes.push("the downloaded file has no metadata (EXIF, ICC): moebius-serve and moebius-inpaint keep it");
    const ending = file === picture ? "png" : suffix;
    const name = `${source.name.replace(/\.\w+$/, "")}-filled.${ending}`;
    return { picture, file, name, seed: Number(given.seed ?? 0), notes };
  }

  /**
   * One call of the worker, which is started where there is none.
   * @param {string} call @param {any} [argument] @param {(now: any) => void} [progress] @param {AbortSignal} [signal]
   * @returns {Promise<any>}
   */
  #call(call, argument, progress = () => {}, signal) {
    const worker = this.#started();
    const id = this.count++;
    return new Promise((resolve, reject) => {
      this.calls.set(id, { id, resolve, reject, progress });
      signal?.addEventListener("abort", () => worker.postMessage({ id, cancel: true }));
      worker.postMessage({ id, call, argument });
      if (signal?.aborted) worker.postMessage({ id, cancel: true });
    });
  }

  #started() {
    if (this.worker) return this.worker;
    if (!this.site) throw new EngineError("The site's description has not been read yet.");
    const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
    worker.addEventListener("message", ({ data }) => this.#answered(data));
    worker.addEventListener("error", (event) => {
      this.#end(`The engine ended (${event.message || "it could not be loaded"}). Try again.`);
    });
    worker.postMessage({ id: -1, call: "open", argument: this.site });
    this.worker = worker;
    return worker;
  }

  /** @param {any} message of the worker */
  #answered({ id, result, error, fatal, progress }) {
    const call = this.calls.get(id);
    if (!call) return;
    if (progress) {
      call.progress(progress);
      return;
    }
    this.calls.delete(id);
    if (error === undefined) call.resolve(result);
    else call.reject(new EngineError(error));
    if (fatal) this.#end(error);
  }

  /** Ends the worker; the next call starts another one. @param {string} words */
  #end(words) {
    this.worker?.terminate();
    this.worker = null;
    for (const call of this.calls.values()) call.reject(new EngineError(words));
    this.calls.clear();
  }
}

/** @param {string} graph @returns {Progress} */
function checking(graph) {
  const words = `Checking this device's results with ${graph}, once…`;
  return { state: "loading", position: 0, step: 0, steps: 0, seconds_left: null, words, share: 1 };
}

/** @param {string} what @param {{done: number, total: number}} now @returns {Progress} */
function loading(what, { done, total }) {
  const words = `Loading ${what}: ${megabytes(done)} of ${megabytes(total)}.`;
  return { state: "loading", position: 0, step: 0, steps: 0, seconds_left: null, words, share: total ? done / total : 0 };
}

/** What the person chose: "wasm", or "" for the best. */
export function chosen() {
  try {
    return localStorage.getItem(CHOICE) === "wasm" ? "wasm" : "";
  } catch {
    return ""; // storage is switched off
  }
}

/**
 * WebGPU where there is an adapter that can run the site's precision, else WebAssembly.
 * @param {string} precision @param {"" | "wasm"} wanted @returns {Promise<{provider: "webgpu" | "wasm", words: string}>}
 */
async function choice(precision, wanted) {
  const gpu = /** @type {any} */ (navigator).gpu;
  const adapter = await gpu?.requestAdapter().catch(() => null);
  const cores = navigator.hardwareConcurrency || 1;
  const threads = globalThis.crossOriginIsolated ? `${Math.min(cores, 8)} threads` : "one thread (the host sends no COOP and COEP headers)";
  const wasm = (/** @type {string} */ why) => ({ provider: /** @type {"wasm"} */ ("wasm"), words: `WebAssembly, ${threads}: ${why}` });
  if (wanted) return wasm("it is chosen at “Run on”");
  if (!gpu) return wasm("this browser has no WebGPU");
  if (!adapter) return wasm("WebGPU has no adapter here");
  if (precision === "fp16" && !adapter.features.has("shader-f16")) return wasm("this GPU has no fp16 (shader-f16)");
  const { vendor, architecture, description } = adapter.info ?? {};
  return { provider: "webgpu", words: `WebGPU (${description || [vendor, architecture].filter(Boolean).join(" ") || "unnamed GPU"})` };
}

/** The pixels of a file, upright, as RGBA. @param {Blob} blob @returns {Promise<ImageData>} */
async function pixelsOf(blob) {
  const bitmap = await createImageBitmap(blob);
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext("2d", { willReadFrequently: true }));
  context.drawImage(bitmap, 0, 0);
  const pixels = context.getImageData(0, 0, bitmap.width, bitmap.height);
  bitmap.close();
  return pixels;
}
