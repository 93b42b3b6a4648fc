// Values by which a device is checked: a graph's seeded inputs, and how far its output is from the manifest's sketch of
// PyTorch's. As moebius_runtime.bundle.check_values, which explains the sketch. It runs in Node too.

import { RandomState } from "./random.js";

/** @typedef {import("./graphs.js").GraphInfo} GraphInfo */
/** @typedef {import("./graphs.js").Feed} Feed */
/**
 * @typedef {object} GraphCheck
 * @property {number} drawn pictures whose inputs are drawn; a graph with an open batch runs the first of them
 * @property {string} inputs_sha256
 * @property {number} norm of the output
 * @property {number[]} projections
 * @property {number[]} values a few elements of the output
 */

const INPUT_SEED = 7;
const SIGN_SEED = 8;

/**
 * Inputs of a graph with the statistics that the pipeline gives it, from a fixed seed: those of the export.
 * @param {GraphInfo} info an open first axis gets one picture
 * @param {number} drawn
 * @returns {Record<string, Feed>}
 */
export function checkInputs(info, drawn) {
  const state = new RandomState(INPUT_SEED);
  const overview = info.inputs.find(({ name }) => name === "overview");
  if (overview) return windowInputs(state, overview.shape.map(Number));
  /** @type {Record<string, Feed>} */
  const inputs = {};
  for (const { name, shape } of info.inputs) {
    const kept = typeof shape[0] === "string" ? 1 : drawn;
    const rest = shape.slice(1).map(Number);
    if (name === "timestep") {
      inputs[name] = { data: BigInt64Array.of(500n), dims: [1] };
    } else if (name === "guidance_scale") {
      inputs[name] = { data: Float32Array.of(2.5), dims: [1] };
    } else {
      const data = drawnOf(name, state, drawn, rest);
      inputs[name] = { data: data.slice(0, kept * product(rest)), dims: [kept, ...rest] };
    }
  }
  return inputs;
}

/** @param {string} name @param {RandomState} state @param {number} drawn @param {number[]} rest @returns {Float32Array} [drawn, ...rest] */
function drawnOf(name, state, drawn, rest) {
  const count = drawn * product(rest);
  if (name === "image") return Float32Array.from({ length: count }, () => -1 + 2 * state.uniform());
  if (name !== "sample") return Float32Array.from({ length: count }, () => state.normal());
  // [drawn, 2C + 1, s, s]: latents, mask, latents of the masked picture
  const [channels, area] = [(rest[0] - 1) / 2, product(rest.slice(1))];
  const part = channels * area;
  const whole = new Float32Array(count);
  const fill = (/** @type {number} */ offset, /** @type {number} */ length, /** @type {() => number} */ draw) => {
    for (let picture = 0; picture < drawn; picture++) {
      const start = picture * (2 * part + area) + offset;
      for (let i = start; i < start + length; i++) whole[i] = draw();
    }
  };
  fill(0, part, () => state.normal());
  fill(part, area, () => Number(state.uniform() < 0.3));
  fill(part + area, part, () => state.normal());
  return whole;
}

/**
 * Inputs of the decoder's upper part, whose window is open: about a quarter of the square, in the top left corner.
 * @param {RandomState} state
 * @param {number[]} overview [1, C, s, s]; a cell of it stands for 4 x 4 of the features
 * @returns {Record<string, Feed>}
 */
function windowInputs(state, [, channels, side]) {
  const rows = Math.floor(side / 2);
  const columns = rows + 1;
  const inside = new Float32Array(side * side).map((_, i) => Number(i / side < rows && i % side < columns));
  const normal = (/** @type {number} */ length) => Float32Array.from({ length }, () => state.normal());
  return {
    features: { data: normal(channels * 16 * rows * columns), dims: [1, channels, 4 * rows, 4 * columns] },
    overview: { data: normal(channels * side * side), dims: [1, channels, side, side] },
    inside: { data: inside, dims: [1, 1, side, side] },
  };
}

/**
 * SHA-256 of the inputs' names, types, shapes and bytes, in hexadecimal.
 * @param {Record<string, Feed>} inputs
 * @param {SubtleCrypto} subtle
 */
export async function inputsDigest(inputs, subtle) {
  const parts = [];
  for (const [name, { data, dims }] of Object.entries(inputs).sort(([a], [b]) => (a < b ? -1 : 1))) {
    const type = data instanceof BigInt64Array ? "int64" : "float32";
    parts.push(new TextEncoder().encode(`${name} ${type} [${dims.join(", ")}]`));
    parts.push(new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
  }
  return sha256(await new Blob(/** @type {BlobPart[]} */ (parts)).arrayBuffer(), subtle);
}

/** In hexadecimal. @param {BufferSource} data @param {SubtleCrypto} subtle */
export async function sha256(data, subtle) {
  const digest = new Uint8Array(await subtle.digest("SHA-256", data));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * An estimate of |output - expected| / |expected| from the sketch; infinite if a value is not finite.
 * @param {GraphCheck} check
 * @param {Float32Array} output
 */
export function relativeError(check, output) {
  if (!output.every(Number.isFinite)) return Infinity;
  const state = new RandomState(SIGN_SEED);
  let squares = 0;
  for (const expected of check.projections) {
    const signs = state.signs(output.length);
    let sum = 0;
    for (let i = 0; i < output.length; i++) sum += signs[i] * output[i];
    squares += (sum / Math.sqrt(output.length) - expected) ** 2;
  }
  // <s, d> / sqrt(n) has the variance |d|^2 / n.
  return Math.sqrt((squares / check.projections.length) * output.length) / check.norm;
}

/** The stored element that differs most, in words. @param {GraphCheck} check @param {Float32Array} output */
export function differingElements({ values }, output) {
  const last = output.length - 1;
  const places = values.map((_, i) => Math.floor(i * (last / (values.length - 1 || 1)))); // as numpy.linspace
  if (values.length > 1) places[values.length - 1] = last;
  const apart = values.map((value, i) => Math.abs(output[places[i]] - value));
  const worst = apart.map((value) => (Number.isNaN(value) ? Infinity : value));
  const index = worst.indexOf(Math.max(...worst));
  const shown = (/** @type {number} */ value) => String(Number(value.toPrecision(6)));
  return `element ${places[index]} is ${shown(output[places[index]])}, expected ${shown(values[index])}`;
}

/** @param {number[]} sides */
function product(sides) {
  return sides.reduce((all, side) => all * side, 1);
}
