// The network's input for a square: known pixels at the network's size, the mask of the unknown ones, and the start.
// As moebius_runtime.regions.network_input. It runs in Node too.

import { windowOf } from "./crop.js";
import { blockMaxima, dilated } from "./masks.js";
import { maskToNetwork, toNetwork } from "./resampling.js";
import { filledCells, filledPixels } from "./smooth_fill.js";

const f32 = Math.fround;

/** @typedef {import("./cells.js").Grid} Grid */
/** @typedef {import("./crop.js").Crop} Crop */
/** @typedef {import("./crop.js").Rect} Rect */
/** @typedef {import("./blend.js").Picture} Picture */
/** @typedef {{image: Float32Array, masked: Grid}} Seen a square: [1, 3, S, S] in -1..1, and what the network fills, [S, S] */

/**
 * The network's input for a crop. Resampling mixes adjacent pixels; so, unless `original`, the unknown ones get smooth
 * values of the known ones first, at the picture's own resolution, and nothing depends on what they hold.
 * @param {Picture} picture
 * @param {Grid} unknown of the crop's window
 * @param {Crop} crop
 * @param {number} size the network's side
 * @param {boolean} original resample masked and invisible pixels with the rest
 * @returns {Seen}
 */
export function seen(picture, unknown, crop, size, original) {
  const rgb = rgbOf(picture, windowOf(crop, picture));
  const square = toNetwork(original ? rgb : filledPixels(rgb, unknown), crop, picture, size);
  const masked = maskToNetwork(unknown, crop, picture, size);
  const area = size * size;
  const image = new Float32Array(3 * area); // [S, S, 3] -> [1, 3, S, S]
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < 3; c++) image[c * area + i] = f32(square.data[i * 3 + c] / 127.5) - 1;
  }
  return { image, masked };
}

/** The colours of a window. @param {Picture} picture @param {Rect} window @returns {import("./resize.js").Rgb} */
export function rgbOf({ data, width }, { top, left, bottom, right }) {
  const rgb = new Uint8Array((bottom - top) * (right - left) * 3);
  for (let y = top, out = 0; y < bottom; y++) {
    for (let x = left; x < right; x++, out += 3) {
      const at = (y * width + x) * 4;
      rgb[out] = data[at];
      rgb[out + 1] = data[at + 1];
      rgb[out + 2] = data[at + 2];
    }
  }
  return { data: rgb, height: bottom - top, width: right - left };
}

/** The fully transparent pixels of a window. @param {Picture} picture @param {Rect} window @returns {Grid} */
export function invisible({ data, width }, { top, left, bottom, right }) {
  const grid = { data: new Uint8Array((bottom - top) * (right - left)), height: bottom - top, width: right - left };
  for (let y = top, out = 0; y < bottom; y++) {
    for (let x = left; x < right; x++, out++) if (!data[(y * width + x) * 4 + 3]) grid.data[out] = 1;
  }
  return grid;
}

/**
 * The masked pixels of a window, and the invisible ones unless `original`: colours that nothing may depend on.
 * @param {Picture} picture
 * @param {Grid} mask of the picture
 * @param {Rect} window
 * @param {boolean} original
 * @returns {Grid}
 */
export function unknownOf(picture, mask, window, original) {
  const unknown = invisible(picture, window);
  if (original) unknown.data.fill(0);
  for (let y = 0, i = 0; y < unknown.height; y++) {
    const row = (window.top + y) * mask.width + window.left;
    for (let x = 0; x < unknown.width; x++, i++) unknown.data[i] |= mask.data[row + x];
  }
  return unknown;
}

/**
 * The masked picture's latents, with smooth values in the cells of the mask and those next to it, into which the encoder
 * mixed the grey of the masked pixels. The latter are kept only where no other cell is known.
 * @param {Float32Array} latents [1, C, s, s]
 * @param {Grid} masked [S, S]
 * @param {number} side s
 * @returns {Float32Array}
 */
export function smoothCells(latents, masked, side) {
  const touched = blockMaxima(masked, side);
  const near = dilated({ data: touched, height: side, width: side }, 1).data;
  return filledCells(latents, near.includes(0) ? near : touched, side);
}
