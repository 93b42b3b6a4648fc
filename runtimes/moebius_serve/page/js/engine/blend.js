// Blending the generated region into the picture. As moebius_runtime.images.blend. It runs in Node too.

import { gaussianBlurred, boxBlurred } from "./blur.js";
import { boundingBox, part } from "./cells.js";
import { dilated } from "./masks.js";

const f32 = Math.fround;

const FEATHER_RADIUS = 3; // pixels of the network's picture
const RING = 10; // pixels of the network's picture around the mask's bounding box
const STRENGTH = f32(1.1); // of the colour compensation

/** @typedef {import("./cells.js").Grid} Grid */
/** @typedef {import("./blur.js").Grey} Grey */
/** @typedef {{data: Uint8Array | Float32Array, height: number, width: number}} Filling RGB in 0 to 255, row by row */
/** @typedef {{data: Uint8ClampedArray, height: number, width: number}} Picture RGBA, row by row */

/**
 * Weights of the generated picture, 255 = all, of a square of `scale` picture pixels per network pixel.
 * @param {Grid} mask
 * @param {"soft" | "hard"} blend
 * @param {number} scale
 * @param {boolean} original the original's feather, across the mask's border
 * @returns {Grey}
 */
export function weightsOf(mask, blend, scale, original) {
  if (blend === "hard") return hard(mask);
  return original ? gaussianBlurred(hard(mask), FEATHER_RADIUS * scale) : outwardFeather(mask, featherWidth(scale));
}

/**
 * 255 on the mask, falling to 0 over `width` pixels around it.
 * @param {Grid} mask
 * @param {number} width
 * @returns {Grey}
 */
export function outwardFeather(mask, width) {
  const inner = Math.floor(width / 2);
  const first = Math.floor(inner / 2);
  const weights = boxBlurred(boxBlurred(hard(dilated(mask, inner)), first), inner - first);
  // At the window's edge the blur repeats the last pixel, which may be outside of the grown mask.
  return { ...weights, data: weights.data.map((value, i) => (mask.data[i] ? 255 : value)) };
}

/** Width of the outward feather in pixels of the picture. @param {number} scale */
export function featherWidth(scale) {
  return Math.min(24, Math.max(8, rounded(8 * scale)));
}

/** Width of the ring whose colours are compared, in pixels of the picture. @param {number} scale */
export function ringWidth(scale) {
  return Math.max(RING, rounded(RING * scale));
}

/** @param {Grid} mask @returns {Grey} */
function hard(mask) {
  return { ...mask, data: mask.data.map((value) => value * 255) };
}

/** To the nearest whole number, halves to the even one. @param {number} value */
function rounded(value) {
  const low = Math.floor(value);
  const above = value - low;
  return above > 0.5 || (above === 0.5 && low % 2) ? low + 1 : low;
}

/**
 * Mixes a window's filling into the picture, in place: filling * m + (1 - m) * picture, m = weight / 255, truncated.
 * Where a weight is 0, and in the alpha channel, the picture's numbers stay.
 * @param {Picture} picture
 * @param {Filling} filling of the window, clipped to 0..255 here
 * @param {Grey} weights of the window
 * @param {{top: number, left: number}} corner of the window
 */
export function blended(picture, filling, weights, { top, left }) {
  for (let y = 0, place = 0; y < weights.height; y++) {
    let at = ((top + y) * picture.width + left) * 4;
    for (let x = 0; x < weights.width; x++, place++, at += 4) {
      if (!weights.data[place]) continue;
      const share = weights.data[place] / 255;
      for (let c = 0; c < 3; c++) {
        const value = Math.min(255, Math.max(0, filling.data[place * 3 + c]));
        picture.data[at + c] = Math.trunc(value * share + (1 - share) * picture.data[at + c]);
      }
    }
  }
}

/**
 * The filling shifted towards the colours around the masked region, not clipped. The shift of each channel is 1.1 times
 * the mean of picture - filling over the known pixels of the mask's bounding box grown by `ring` pixels.
 * @param {Filling} filling
 * @param {Filling} around the picture's window
 * @param {Grid} mask
 * @param {Grid} unknown pixels that do not count, beside the mask's
 * @param {number} ring
 * @returns {Filling}
 */
export function compensated(filling, around, mask, unknown, ring) {
  const box = boundingBox(mask);
  const data = Float32Array.from(filling.data);
  if (!box) return { ...filling, data };
  const [top, left] = [Math.max(0, box.top - ring), Math.max(0, box.left - ring)];
  const near = { top, left, bottom: box.bottom + ring, right: box.right + ring };
  const [masked, hidden] = [part(mask, near), part(unknown, near)];
  const [seen, made] = [[0, 0, 0], [0, 0, 0]];
  let known = 0;
  for (let y = 0, i = 0; y < masked.height; y++) {
    for (let x = 0; x < masked.width; x++, i++) {
      if (masked.data[i] || hidden.data[i]) continue;
      known++;
      const at = ((top + y) * filling.width + left + x) * 3;
      for (let c = 0; c < 3; c++) {
        seen[c] += around.data[at + c];
        made[c] += filling.data[at + c];
      }
    }
  }
  if (!known) return { ...filling, data };
  const shift = seen.map((sum, c) => f32(STRENGTH * f32(sum / known - made[c] / known)));
  for (let i = 0; i < data.length; i++) data[i] += shift[i % 3];
  return { ...filling, data };
}
