// The graphs in onnxruntime-web: one in memory at a time, on WebGPU or WebAssembly.

import { DeviceError } from "../engine/errors.js";
import { joined, megabytes, shardsOf, StorageError } from "./storage.js";

/** @typedef {import("./storage.js").Shard} Shard */
/** @typedef {import("./storage.js").GraphFiles} GraphFiles */
/** @typedef {import("../engine/graphs.js").Feed} Feed */
/** @typedef {Record<string, Feed>} Tensors */
/** @typedef {Record<string, {data: Float32Array, dims: number[]}>} Outputs */
/** @typedef {{done: number, total: number}} Loaded bytes of a graph */

/** The engine cannot go on in this worker: the page starts another one for the next try. */
export class FatalError extends Error {}

export class Sessions {
  /**
   * @param {any} ort onnxruntime-web
   * @param {Record<string, GraphFiles>} graphs
   * @param {import("./storage.js").Storage} storage
   * @param {"webgpu" | "wasm"} provider
   * @param {import("./device_check.js").DeviceCheck} deviceCheck
   * @param {(graph: string, loaded: Loaded | null) => void} onLoad null: it is loaded and the device is checked with it
   */
  constructor(ort, graphs, storage, provider, deviceCheck, onLoad) {
    this.ort = ort;
    this.graphs = graphs;
    this.storage = storage;
    this.provider = provider;
    this.deviceCheck = deviceCheck;
    this.onLoad = onLoad;
    /** @type {Set<string>} for the person */
    this.notes = new Set();
    /** @type {{name: string, session: any} | null} */
    this.loaded = null;
    /** @type {Promise<never> | null} rejects when the GPU is lost */
    this.lost = null;
    /** @type {AbortSignal | undefined} of downloads */
    this.signal = undefined;
  }

  /** @param {string} name @param {Tensors} feeds @returns {Promise<Outputs>} */
  async run(name, feeds) {
    return this.#ran(name, await this.#session(name), feeds);
  }

  /** @param {string} name @param {any} session @param {Tensors} feeds @returns {Promise<Outputs>} */
  async #ran(name, session, feeds) {
    /** @type {Record<string, any>} */
    const tensors = {};
    for (const [input, { data, dims }] of Object.entries(feeds)) {
      tensors[input] = new this.ort.Tensor(data instanceof BigInt64Array ? "int64" : "float32", data, dims);
    }
    try {
      const outputs = await (this.lost ? Promise.race([session.run(tensors), this.lost]) : session.run(tensors));
      /** @type {Outputs} */
      const found = {};
      for (const [output, tensor] of Object.entries(outputs)) {
        found[output] = { data: /** @type {any} */ (tensor).data, dims: [.../** @type {any} */ (tensor).dims] };
      }
      return found;
    } catch (error) {
      throw failed(name, error);
    }
  }

  async release() {
    const held = this.loaded;
    this.loaded = null;
    this.lost = null; // the release of the only session destroys its device; the next session gets another one
    await held?.session.release();
  }

  /** @param {string} name */
  async #session(name) {
    if (this.loaded?.name === name) return this.loaded.session;
    await this.release(); // before the next one is read: one graph in memory at a time
    const files = this.graphs[name];
    const total = shardsOf(files).reduce((sum, shard) => sum + shard.size, 0);
    let before = 0;
    /** @param {Shard[]} shards */
    const content = async (shards) => {
      const parts = [];
      for (const shard of shards) {
        const onBytes = (/** @type {number} */ bytes) => this.onLoad(name, { done: before + bytes, total });
        parts.push(await this.storage.get(shard, onBytes, this.signal));
        before += shard.size;
        this.onLoad(name, { done: before, total });
      }
      return parts.length === 1 ? parts[0] : joined(parts);
    };
    const externalData = [];
    for (const [path, shards] of Object.entries(files.data)) externalData.push({ path, data: await content(shards) });
    const model = await content(files.model);
    let session;
    try {
      session = await this.ort.InferenceSession.create(model, {
        executionProviders: [this.provider],
        externalData,
        graphOptimizationLevel: "all",
      });
      this.loaded = { name, session };
      if (this.provider === "webgpu") this.lost = lossOf(await this.ort.env.webgpu.device);
    } catch (error) {
      throw failed(name, error, total);
    }
    await this.#checkDevice(name, session);
    return session;
  }

  /** Compares the graph's result on stored inputs with PyTorch's, once per device. @param {string} name @param {any} session */
  async #checkDevice(name, session) {
    const run = async (/** @type {Tensors} */ inputs) => {
      this.onLoad(name, null);
      const [output] = Object.values(await this.#ran(name, session, inputs));
      return output.data;
    };
    try {
      const note = await this.deviceCheck.check(name, await this.#computes(), run);
      if (note) this.notes.add(note);
    } catch (error) {
      await this.release().catch(() => undefined); // of a lost GPU, too; no graph of a refused device stays
      throw error;
    }
  }

  /** @returns {Promise<import("./device_check.js").Computes>} */
  async #computes() {
    const versions = `onnxruntime-web ${this.ort.env.versions.web}, ${globalThis.navigator?.userAgent}`;
    if (this.provider === "wasm") return { provider: "wasm", device: "WebAssembly", versions };
    const { vendor, architecture, device, description } = (await this.ort.env.webgpu.device).adapterInfo ?? {};
    const name = [description, vendor, architecture, device].filter(Boolean).join(" ");
    return { provider: "webgpu", device: `the GPU (${name || "unnamed"})`, versions };
  }
}

/** @param {any} device @returns {Promise<never>} */
function lossOf(device) {
  const lost = device.lost.then((/** @type {any} */ info) => {
    throw new FatalError(
      `The GPU was lost in the middle of the work (${info.message || info.reason}). The picture and the mask are still ` +
        "there: try again.",
    );
  });
  lost.catch(() => undefined); // also where no graph runs at that moment
  return lost;
}

/** @param {string} name @param {unknown} error @param {number} [size] of the graph that was to be loaded */
function failed(name, error, size) {
  if (error instanceof FatalError || error instanceof StorageError || error instanceof DeviceError) return error;
  const words = error instanceof Error ? error.message : String(error);
  const memory = error instanceof RangeError || /alloc|memory/i.test(words);
  const what = memory ? `This browser has too little memory for ${name}` : `The graph ${name} cannot be run here`;
  return new FatalError(`${what}${size ? ` (${megabytes(size)})` : ""}: ${words}. Try again, or close other tabs first.`);
}
