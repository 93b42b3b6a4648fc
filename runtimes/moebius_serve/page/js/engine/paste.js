// Blending a generated square into the picture. As moebius_runtime.regions.paste. It runs in Node too.

import { blended, compensated, ringWidth, weightsOf } from "./blend.js";
import { boundingBox } from "./cells.js";
import { windowOf } from "./crop.js";
import { invisible, rgbOf, unknownOf } from "./network_input.js";
import { fromNetwork } from "./resampling.js";
import { ownPixels } from "./square.js";

const f32 = Math.fround;

const LANCZOS = 3; // pixels on both sides that the resampling to the picture reads, more where it shrinks

/** @typedef {import("./cells.js").Grid} Grid */
/** @typedef {import("./crop.js").Rect} Rect */
/** @typedef {import("./blend.js").Picture} Picture */
/** @typedef {import("./square.js").Square} Square */
/** @typedef {{blend: "soft" | "hard", original: boolean}} Blending the settings that are read here */

/**
 * The part of a square at the network's size that `pasted` reads.
 * @param {Square} square
 * @param {Grid} unknown of the picture: the pixels that no square has filled yet
 * @param {number} size the network's side
 * @param {Blending} settings
 * @param {boolean} compensate whether `pasted` will compensate the colour
 * @returns {Rect}
 */
export function pastedBox(square, unknown, size, { blend, original }, compensate) {
  const { crop } = square;
  const [window, area] = [windowOf(crop, unknown), ownPixels(square, unknown)];
  const scale = crop.side / size;
  const weights = weightsOf(area, blend, scale, original);
  const used = boundingBox({ ...weights, data: weights.data.map((value) => (value ? 1 : 0)) });
  const own = boundingBox(area);
  if (!used || !own) throw new Error("a square owns no pixel of the mask");
  const reach = Math.ceil(LANCZOS * Math.max(1, 1 / scale)) + 1;
  const ring = ringWidth(scale);
  /** @param {number} first @param {number} last @param {number} low @param {number} high @param {number} start */
  const along = (first, last, low, high, start) => {
    if (compensate) [first, last] = [Math.min(first, low - ring), Math.max(last, high + ring)];
    const from = Math.floor((first + start) / scale) - reach;
    return [Math.max(0, from), Math.min(size, Math.ceil((last + start) / scale) + reach)];
  };
  const [top, bottom] = along(used.top, used.bottom, own.top, own.bottom, window.top - crop.top);
  const [left, right] = along(used.left, used.right, own.left, own.right, window.left - crop.left);
  return { top, left, bottom, right };
}

/**
 * Blends the part of the mask that a square owns into the picture, and marks it as known. Both change in place.
 * @param {import("./resize.js").Rgb} generated [S, S]
 * @param {Square} square
 * @param {Picture} picture
 * @param {Grid} unknown of the picture
 * @param {Blending} settings
 * @param {{compensate: boolean, grey: boolean}} colour shift the filling towards the colours around it; make it grey
 */
export function pasted(generated, square, picture, unknown, { blend, original }, { compensate, grey }) {
  const window = windowOf(square.crop, picture);
  const area = ownPixels(square, unknown);
  const scale = square.crop.side / generated.height;
  /** @type {import("./blend.js").Filling} */
  let filling = fromNetwork(generated, square.crop, picture);
  if (grey) filling = luma(filling);
  const hidden = original ? null : invisible(picture, window);
  if (compensate) {
    const unseen = unknownOf(picture, unknown, window, original);
    filling = compensated(filling, rgbOf(picture, window), area, unseen, ringWidth(scale));
  }
  const weights = weightsOf(area, blend, scale, original);
  if (hidden) {
    // Invisible pixels stay bit-exact.
    weights.data = weights.data.map((value, i) => (hidden.data[i] && !area.data[i] ? 0 : value));
  }
  blended(picture, filling, weights, window);
  for (let y = 0, i = 0; y < area.height; y++) {
    const row = (window.top + y) * unknown.width + window.left;
    for (let x = 0; x < area.width; x++, i++) if (area.data[i]) unknown.data[row + x] = 0;
  }
}

/** Grey by luma (ITU-R BT.601), not rounded. @param {import("./blend.js").Filling} rgb */
function luma({ data, height, width }) {
  const grey = new Float32Array(data.length);
  for (let i = 0; i < data.length; i += 3) {
    const first = f32(f32(f32(0.299) * data[i]) + f32(f32(0.587) * data[i + 1]));
    grey.fill(f32(first + f32(f32(0.114) * data[i + 2])), i, i + 3);
  }
  return { data: grey, height, width };
}
