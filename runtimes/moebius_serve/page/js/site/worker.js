// The worker that owns the graphs: it downloads, stores, and runs them, and answers the page's calls one by one.

import { inpaint } from "../engine/pipeline.js";
import { DeviceCheck } from "./device_check.js";
import { FatalError, Sessions } from "./sessions.js";
import { shardsOf, Storage, StorageError } from "./storage.js";

const ROOT = new URL("../../../", import.meta.url);
/** @type {Map<number, AbortController>} */
const running = new Map();
/** @type {any} */
let site = null;
/** @type {Storage | null} */
let storage = null;
/** @type {Promise<any> | null} */
let runtime = null;

function shelf() {
  storage ??= new Storage(ROOT);
  return storage;
}

const deviceCheck = () => new DeviceCheck(site, ROOT, shelf().use);

function everyShard() {
  const every = Object.values(site.graphs).flatMap((files) => shardsOf(/** @type {any} */ (files)));
  return [...new Map(every.map((shard) => [shard.sha256, shard])).values()];
}

/** @returns {Promise<any>} onnxruntime-web, with threads where the browser allows them */
async function load() {
  const folder = new URL("ort/", ROOT);
  const ort = await import(new URL("ort.webgpu.min.mjs", folder).href);
  ort.env.wasm.wasmPaths = folder.href;
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency || 1, 8) : 1;
  ort.env.logLevel = "error";
  return ort;
}

/** @type {Record<string, (argument: any, progress: (now: any) => void, signal: AbortSignal) => Promise<any>>} */
const calls = {
  open: async (description) => {
    site = description;
  },
  stored: async () => ({ stored: await shelf().stored(everyShard()), total: site.size }),
  clear: async () => {
    await shelf().clear();
    await deviceCheck().clear();
  },
  download: async (_, progress, signal) => {
    let done = 0;
    for (const shard of everyShard()) {
      const before = done;
      await shelf().get(shard, (bytes) => progress({ done: before + bytes, total: site.size }), signal);
      done += shard.size;
      progress({ done, total: site.size });
    }
  },
  inpaint: async ({ provider, image, mask, options }, progress, signal) => {
    runtime ??= load();
    const ort = await runtime.catch((error) => {
      throw new FatalError(`onnxruntime-web cannot be loaded (${error.message}). Try again.`);
    });
    const loading = (/** @type {string} */ graph, /** @type {any} */ loaded) => progress({ graph, loaded });
    const sessions = new Sessions(ort, site.graphs, shelf(), provider, deviceCheck(), loading);
    sessions.signal = signal;
    try {
      const steps = (/** @type {any} */ { done, total }) => progress({ step: done, steps: total });
      const filled = await inpaint(sessions, site.manifest, image, mask, options, steps, signal);
      return { ...filled, notes: [...filled.notes, ...sessions.notes] };
    } finally {
      await sessions.release();
    }
  },
};

self.addEventListener("message", async (/** @type {MessageEvent} */ { data: { id, call, argument, cancel } }) => {
  if (cancel) {
    running.get(id)?.abort();
    return;
  }
  const controller = new AbortController();
  running.set(id, controller);
  try {
    const result = await calls[call](argument, (progress) => self.postMessage({ id, progress }), controller.signal);
    self.postMessage({ id, result });
  } catch (error) {
    const { name, message } = error instanceof Error ? error : new Error(String(error));
    const known = ["InputError", "OutputError", "DeviceError", "AbortError"].includes(name) || error instanceof StorageError;
    self.postMessage({ id, error: message, fatal: error instanceof FatalError || !known });
  } finally {
    running.delete(id);
  }
});
