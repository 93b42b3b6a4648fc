// The graphs of a bundle: which ones a run takes, and their runs. As moebius_runtime.graph_choice. It runs in Node too.

import { InputError, OutputError } from "./errors.js";

/** @typedef {{name: string, dtype: string, shape: (number | string)[]}} TensorInfo */
/** @typedef {{inputs: TensorInfo[], outputs: TensorInfo[]}} GraphInfo */
/**
 * What the engine reads of a bundle's `manifest.json`.
 * @typedef {object} Manifest
 * @property {{image_size: number, latent_size: number, latent_channels: number}} geometry
 * @property {import("./schedule.js").ScheduleInfo} schedule
 * @property {{num_inference_steps: number, guidance_scale: number, strength: number, noise_offset: number,
 *   sampler?: string}} defaults
 * @property {Record<string, GraphInfo>} graphs
 * @property {Record<string, GraphInfo>} [decoders]
 * @property {{distilled: number} | null} [guidance] the scale of the guidance inside the network
 * @property {Record<string, object>} [modes] the bundle's own defaults of modes
 */
/** @typedef {{data: Float32Array | BigInt64Array, dims: number[]}} Feed */
/** @typedef {Record<string, {data: Float32Array, dims: number[]}>} Outputs by name */
/**
 * Runs graphs by name. It may load a graph at its first run and release it when another one is run.
 * @typedef {{run: (graph: string, feeds: Record<string, Feed>) => Promise<Outputs>}} Sessions
 */
/** @typedef {import("./settings.js").Settings} Settings */
/** @typedef {(graph: string, inputs: Record<string, {data: Float32Array | number[], dims: number[]}>) => Promise<Float32Array>} Run */

export const FULL = ["vae_decoder"];
export const TINY = ["vae_decoder_tiny"];
export const MASKED = ["vae_decoder_lower", "vae_decoder_upper"];

/** @param {Manifest} manifest @param {string} graph @returns {GraphInfo | undefined} */
function infoOf(manifest, graph) {
  return manifest.graphs[graph] ?? manifest.decoders?.[graph];
}

/**
 * The U-Net's graph of a run, and its guidance scale at each step: 1 outside of the guidance interval. Where no step has
 * guidance, the conditional branch alone gives the same at half the cost. Where some have, one graph serves them all, as
 * one is in memory at a time: at scale 1 the guidance cancels out.
 * @param {Manifest} manifest
 * @param {Settings} settings
 * @param {number[]} timesteps of the run
 * @returns {{graph: string, scaleAt: (timestep: number) => number}}
 * @throws {InputError} the bundle has the conditional branch alone, and a scale is not 1
 */
export function branchOf(manifest, { guidance_interval, guidance_scale }, timesteps) {
  const [low, high] = guidance_interval ?? [0, Infinity];
  const scaleAt = (/** @type {number} */ timestep) => (low <= timestep && timestep <= high ? guidance_scale : 1);
  const alone = timesteps.every((timestep) => scaleAt(timestep) === 1);
  if (alone && infoOf(manifest, "unet_conditional")) return { graph: "unet_conditional", scaleAt };
  if (infoOf(manifest, "unet")) return { graph: "unet", scaleAt };
  throw new InputError(`guidance_scale ${guidance_scale}: this site's network has no guidance; use 1, or leave it out`);
}

/**
 * The graphs that decode: `TINY`, `MASKED` or `FULL`. A mode's default that the bundle cannot serve gives `FULL`, with
 * a note.
 * @param {Manifest} manifest
 * @param {Settings} settings
 * @param {import("./settings.js").Options} options
 * @returns {{graphs: string[], note: string | null}}
 * @throws {InputError} an explicit option cannot be served
 */
export function decodersOf(manifest, settings, options) {
  /** @type {[boolean, string | undefined, string[], string][]} */
  const ways = [
    [settings.vae_decoder === "tiny", options.vae_decoder, TINY, "vae_decoder"],
    [settings.decode === "masked", options.decode, MASKED, "decode"],
  ];
  const found = ways.find(([wanted]) => wanted);
  if (!found) return { graphs: FULL, note: null };
  const [, explicit, graphs, option] = found;
  const absent = graphs.filter((graph) => !infoOf(manifest, graph));
  if (!absent.length) return { graphs, note: null };
  const missing = `there is no graph ${absent.join(", ")}`;
  if (explicit) throw new InputError(`${option} ${explicit}: ${missing}. Use ${option} full`);
  return { graphs: FULL, note: `the mode would decode faster, but ${missing}: the whole square is decoded in full` };
}

/**
 * Runs of the bundle's graphs, checked. Before each one the event loop gets a turn, so that a worker hears of an abort.
 * @param {Sessions} sessions
 * @param {Manifest} manifest
 * @param {AbortSignal} [signal]
 * @returns {Run} gives a graph's one output
 */
export function runner(sessions, manifest, signal) {
  return async (graph, inputs) => {
    await new Promise((resolve) => setTimeout(resolve, 0));
    signal?.throwIfAborted();
    const info = infoOf(manifest, graph);
    if (!info) throw new OutputError(`the bundle has no graph ${graph}; export it again`);
    const feeds = Object.fromEntries(
      info.inputs.map(({ name, dtype, shape }) => [name, feedOf(graph, name, dtype, shape, inputs[name])]),
    );
    const outputs = await sessions.run(graph, feeds);
    signal?.throwIfAborted();
    const { name, shape } = info.outputs[0];
    const output = outputs[name];
    if (!output || !agrees(output.dims, shape) || output.data.length !== size(output.dims)) {
      const got = output ? `[${output.dims}]` : Object.keys(outputs).join(", ");
      throw new OutputError(`${graph} gave ${got}; expected ${name} [${shape}]. Export the bundle again.`);
    }
    checkValues(graph, output.data);
    return output.data;
  };
}

/**
 * @param {string} graph
 * @param {string} name
 * @param {string} dtype
 * @param {(number | string)[]} shape
 * @param {{data: Float32Array | number[], dims: number[]} | undefined} input
 * @returns {Feed}
 */
function feedOf(graph, name, dtype, shape, input) {
  if (!input) throw new OutputError(`graph ${graph} wants an input ${name}; the engine has none. Export the bundle again.`);
  const { data, dims } = input;
  if (!agrees(dims, shape) || data.length !== size(dims)) {
    throw new OutputError(`graph ${graph} takes ${name} [${shape}]; the engine has [${dims}]. Export the bundle again.`);
  }
  if (dtype === "int64") return { data: BigInt64Array.from(Array.from(data, BigInt)), dims };
  if (dtype !== "float32") throw new OutputError(`graph ${graph} takes ${name} as ${dtype}; expected int64 or float32`);
  return { data: data instanceof Float32Array ? data : Float32Array.from(data), dims };
}

/** Whether dimensions are those of a shape; a name in it stands for any. @param {readonly number[]} dims @param {(number | string)[]} shape */
function agrees(dims, shape) {
  return dims.length === shape.length && shape.every((want, i) => typeof want === "string" || want === dims[i]);
}

/** @param {readonly number[]} dims */
function size(dims) {
  return dims.reduce((product, side) => product * side, 1);
}

/** @param {string} graph @param {Float32Array} data */
function checkValues(graph, data) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of data) {
    if (!Number.isFinite(value)) throw new OutputError(`the output of ${graph} holds NaN or infinity; try another device`);
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (low === high) throw new OutputError(`the output of ${graph} is one constant; try another device`);
}
