// Checks a device before it is trusted: one run per graph against the values that PyTorch gave at export. The verdict is
// kept in this browser, by all that decides which code runs. As moebius_runtime.backends.self_check. It runs in Node too.

import { checkInputs, differingElements, inputsDigest, relativeError, sha256 } from "../engine/check_values.js";
import { DeviceError } from "../engine/errors.js";
import { shardsOf } from "./storage.js";

export const VERDICTS = "moebius-device-checks";

/**
 * What computes the graphs.
 * @typedef {object} Computes
 * @property {"webgpu" | "wasm"} provider
 * @property {string} device its name
 * @property {string} versions of browser and libraries
 */
/** @typedef {import("../engine/check_values.js").GraphCheck} GraphCheck */
/** @typedef {{error: number, words: string}} Verdict */
/** @typedef {(inputs: Record<string, import("../engine/graphs.js").Feed>) => Promise<Float32Array>} RunGraph gives the one output */

export class DeviceCheck {
  /**
   * @param {{manifest: any, graphs: Record<string, import("./storage.js").GraphFiles>, tolerance: number, precision: string}} site
   * @param {URL} root of the site
   * @param {{caches: CacheStorage, subtle: SubtleCrypto}} use
   */
  constructor(site, root, use) {
    this.site = site;
    this.root = root;
    this.use = use;
  }

  /**
   * Runs a graph once on its stored inputs, unless the verdict is kept.
   * @param {string} graph
   * @param {Computes} computes
   * @param {RunGraph} run
   * @returns {Promise<string | null>} a note for the person
   * @throws {DeviceError} the output is not PyTorch's
   */
  async check(graph, computes, run) {
    const { manifest, tolerance, precision } = this.site;
    /** @type {GraphCheck | undefined} */
    const check = manifest.checks?.[graph];
    if (!check) {
      return (
        `this site holds no values to check ${computes.device} by, so its results are not checked; export the bundle ` +
        "and the site again to get them"
      );
    }
    const address = await this.#address(graph, check, computes);
    let verdict = await this.#kept(address);
    if (!verdict) {
      const inputs = checkInputs(manifest.graphs[graph] ?? manifest.decoders[graph], check.drawn);
      if ((await inputsDigest(inputs, this.use.subtle)) !== check.inputs_sha256) {
        return `this browser draws other inputs for ${graph} than the export did, so ${computes.device} was not checked`;
      }
      const output = await run(inputs);
      verdict = { error: relativeError(check, output), words: differingElements(check, output) };
      await this.#keep(address, verdict);
    }
    if (verdict.error <= tolerance) return null; // NaN fails
    throw new DeviceError(failed(graph, computes, verdict, tolerance, precision));
  }

  /** Forgets every verdict. */
  async clear() {
    await this.use.caches.delete(VERDICTS);
  }

  /** @param {string} graph @param {GraphCheck} check @param {Computes} computes */
  async #address(graph, check, computes) {
    const files = shardsOf(this.site.graphs[graph]).map((shard) => shard.sha256);
    const key = JSON.stringify([graph, check, computes, this.site.precision, files]);
    const digest = await sha256(new TextEncoder().encode(key), this.use.subtle);
    return new URL(`device-checks/${graph}-${digest}.json`, this.root).href;
  }

  /** @param {string} address @returns {Promise<Verdict | null>} null for a missing or damaged one */
  async #kept(address) {
    const answer = await (await this.use.caches.open(VERDICTS)).match(address);
    const { error, words } = (await answer?.json().catch(() => null)) ?? {};
    // JSON has no infinity: a text stands for it.
    return typeof error === "string" && typeof words === "string" ? { error: Number(error), words } : null;
  }

  /** @param {string} address @param {Verdict} verdict */
  async #keep(address, { error, words }) {
    const text = JSON.stringify({ error: String(error), words });
    try {
      await (await this.use.caches.open(VERDICTS)).put(address, new Response(text));
    } catch {
      // A browser without room checks again next time.
    }
  }
}

/** @param {string} graph @param {Computes} computes @param {Verdict} verdict @param {number} tolerance @param {string} precision */
function failed(graph, { provider, device, versions }, { error, words }, tolerance, precision) {
  const instead = provider === "webgpu" ? `choose WebAssembly at "Run on" (slower), or use another browser` : "use another browser";
  return (
    `${device} computes ${graph} wrongly (${versions}): relative error ${error.toExponential(1)}, at most ` +
    `${tolerance.toExponential(0)} is expected in ${precision}; ${words}. Nothing was painted. To go on, ${instead}, and ` +
    "please report this line. It is checked again after an update of browser or driver, or once the stored model is cleared."
  );
}
