// Decoding of latents: the whole square by the full or the tiny decoder, or only the part that is pasted.
// As moebius_runtime.decoding. It runs in Node too.

import { OutputError } from "./errors.js";
import { MASKED } from "./graphs.js";

const f32 = Math.fround;

const MARGIN = 12; // cells of the features around what is pasted: the upper levels' receptive field
const SMALLEST = 48; // side of a window in cells, if the square has them
const LARGEST = 0.75; // share of the square from which on the whole is decoded
const CONSTANT = 0.01; // grey levels: a decoded picture whose values span less holds nothing

/** @typedef {import("./crop.js").Rect} Rect */
/** @typedef {import("./graphs.js").Manifest} Manifest */
/** @typedef {import("./graphs.js").Run} Run */
/** @typedef {import("./resize.js").Rgb} Rgb */

/**
 * The generated square, [S, S]; black outside of a window.
 * @param {Run} run
 * @param {string} graph that decodes the whole square, where there is no window
 * @param {Float32Array} latents [1, C, s, s]
 * @param {Rect | null} window what to decode, in cells of the features; null decodes all
 * @param {Manifest} manifest
 * @returns {Promise<Rgb>}
 * @throws {OutputError} what was decoded is one flat colour
 */
export async function decoded(run, graph, latents, window, manifest) {
  const { image_size: size, latent_size: side, latent_channels: channels } = manifest.geometry;
  const latent = { data: latents, dims: [1, channels, side, side] };
  const values = window ? await decodedWindow(run, latent, window, manifest) : await run(graph, { latent });
  const cell = window ? size / sides(manifest).side : 1;
  const { top, left, bottom, right } = window ?? { top: 0, left: 0, bottom: size, right: size };
  const [height, width] = [(bottom - top) * cell, (right - left) * cell];
  const data = new Uint8Array(size * size * 3).fill(window ? 127 : 0); // a decoded 0
  let [low, high] = [1, -1];
  for (let c = 0, i = 0; c < 3; c++) {
    for (let y = 0; y < height; y++) {
      const row = (top * cell + y) * size + left * cell;
      for (let x = 0; x < width; x++, i++) {
        const value = values[i];
        low = Math.min(low, value);
        high = Math.max(high, value);
        const share = Math.min(1, Math.max(0, f32(value + 1) / 2));
        data[(row + x) * 3 + c] = Math.trunc(f32(share * 255));
      }
    }
  }
  if ((Math.min(1, high) - Math.max(-1, low)) * 127.5 < CONSTANT) {
    throw new OutputError("the decoded picture is one flat colour; try the bundle on another picture, or another device");
  }
  return { data, height: size, width: size };
}

/**
 * @param {Run} run
 * @param {{data: Float32Array, dims: number[]}} latent
 * @param {Rect} window
 * @param {Manifest} manifest
 * @returns {Promise<Float32Array>} [1, 3, h, w] of the window in pixels
 */
async function decodedWindow(run, latent, window, manifest) {
  const { side, block } = sides(manifest);
  const features = await run(MASKED[0], { latent }); // [1, F, side, side]
  const count = features.length / (side * side);
  const small = side / block;
  const [rows, columns] = [window.bottom - window.top, window.right - window.left];
  const part = new Float32Array(count * rows * columns);
  const overview = new Float32Array(count * small * small); // the middle cell of each block
  const inside = new Float32Array(small * small);
  const middle = Math.floor(block / 2);
  for (let f = 0; f < count; f++) {
    const plane = features.subarray(f * side * side, (f + 1) * side * side);
    for (let y = 0; y < rows; y++) {
      const start = (window.top + y) * side + window.left;
      part.set(plane.subarray(start, start + columns), (f * rows + y) * columns);
    }
    for (let y = 0; y < small; y++) {
      for (let x = 0; x < small; x++) {
        overview[(f * small + y) * small + x] = plane[(y * block + middle) * side + x * block + middle];
      }
    }
  }
  for (let y = Math.floor(window.top / block); y < Math.floor(window.bottom / block); y++) {
    inside.fill(1, y * small + Math.floor(window.left / block), y * small + Math.floor(window.right / block));
  }
  return run(MASKED[1], {
    features: { data: part, dims: [1, count, rows, columns] },
    overview: { data: overview, dims: [1, count, small, small] },
    inside: { data: inside, dims: [1, 1, small, small] },
  });
}

/**
 * The window that a masked decode of a box takes, in cells of the features, or null where the whole square is as quick.
 * Its edges are multiples of the overview's blocks.
 * @param {Rect} box what is needed of the square, in pixels
 * @param {Manifest} manifest of a bundle with the graphs `MASKED`
 * @returns {Rect | null}
 */
export function decodedWindowOf(box, manifest) {
  const { side, block } = sides(manifest);
  const cell = Math.floor(manifest.geometry.image_size / side);
  const least = Math.min(SMALLEST, side);
  /** @param {number} start @param {number} stop */
  const reach = (start, stop) => {
    const from = Math.floor(start / cell) - MARGIN;
    const to = Math.ceil(stop / cell) + MARGIN;
    const missing = Math.max(0, least - (to - from));
    const before = Math.floor(missing / 2);
    const first = Math.min(Math.max(0, from - before), side - least);
    const last = Math.max(Math.min(side, to + missing - before), first + least);
    return [Math.floor(first / block) * block, Math.min(side, Math.ceil(last / block) * block)];
  };
  const [top, bottom] = reach(box.top, box.bottom);
  const [left, right] = reach(box.left, box.right);
  return (bottom - top) * (right - left) < LARGEST * side * side ? { top, left, bottom, right } : null;
}

/** Side of the features in cells, and of the overview's blocks in cells of the features. @param {Manifest} manifest */
function sides({ decoders }) {
  const side = Number(decoders?.[MASKED[0]].outputs[0].shape[2]);
  return { side, block: Math.floor(side / Number(decoders?.[MASKED[1]].inputs[1].shape[2])) };
}
