// Masks: checked, grown, and reduced to latent cells. As moebius_runtime.images.masks. It runs in Node too.

import { grown } from "../bits.js";
import { boundingBox, components, part } from "./cells.js";
import { InputError } from "./errors.js";

/** @typedef {import("./cells.js").Grid} Grid */

const HALF = 128; // the lowest value whose share of 255 is 0.5 or more

/**
 * The pixels to fill, of a mask in bytes: those of half of 255 and more.
 * @param {{data: ArrayLike<number>, height: number, width: number}} mask
 * @param {{height: number, width: number}} shape of the picture
 * @returns {Grid}
 * @throws {InputError} the mask has another size, or marks nothing or everything
 */
export function markedPixels(mask, { height, width }) {
  if (mask.height !== height || mask.width !== width || mask.data.length !== height * width) {
    throw new InputError(
      `the mask is ${mask.width}x${mask.height} pixels of ${mask.data.length} bytes, the picture ${width}x${height}; ` +
        "make them equal, with one byte a pixel",
    );
  }
  const data = new Uint8Array(height * width);
  for (let i = 0; i < data.length; i++) if (mask.data[i] >= HALF) data[i] = 1;
  if (!data.includes(1)) throw new InputError("the mask marks nothing to fill; mark what to replace");
  if (!data.includes(0)) throw new InputError("the mask marks every pixel, which leaves nothing to fill from");
  return { data, height, width };
}

/**
 * The mask grown by some pixels; `auto`: by `automaticDilation`, unless that leaves nothing to fill from.
 * @param {Grid} mask
 * @param {number | "auto"} dilation
 * @returns {Grid}
 * @throws {InputError} grown by a given number of pixels, it marks everything
 */
export function grownMask(mask, dilation) {
  const wider = dilated(mask, dilation === "auto" ? automaticDilation(mask) : dilation);
  if (wider.data.includes(0)) return wider;
  if (dilation === "auto") return mask;
  throw new InputError(
    `the mask, grown by ${dilation} pixels, marks every pixel, which leaves nothing to fill from; grow it by less`,
  );
}

/** Pixels to grow a mask by for soft edges. @param {{height: number, width: number}} shape */
export function automaticDilation({ height, width }) {
  return Math.min(16, 2 + Math.floor(Math.max(height, width) / 500));
}

/** 1 wherever the square of 2 * pixels + 1 around holds a 1. @param {Grid} mask @param {number} pixels @returns {Grid} */
export function dilated(mask, pixels) {
  const box = boundingBox(mask);
  if (!box || !pixels) return mask;
  const [top, left] = [Math.max(0, box.top - pixels), Math.max(0, box.left - pixels)];
  const near = part(mask, { top, left, bottom: box.bottom + pixels, right: box.right + pixels });
  const wider = grown(near.data, near.width, pixels);
  const data = mask.data.slice();
  for (let y = 0; y < near.height; y++) {
    data.set(wider.subarray(y * near.width, (y + 1) * near.width), (top + y) * mask.width + left);
  }
  return { ...mask, data };
}

/**
 * The mask at latent size. `nearest` takes the top left pixel of each block, `max` any pixel of it. Where nearest would
 * lose a whole region of the mask (8-connected), max is used.
 * @param {Grid} mask [S, S]
 * @param {number} cells s, a divisor of S
 * @param {"nearest" | "max"} mode
 * @returns {{cells: Float32Array, note: string | null}} 0 and 1, [s, s]
 */
export function reducedMask(mask, cells, mode) {
  const block = mask.width / cells;
  const pooled = blockMaxima(mask, cells);
  if (mode === "max") return { cells: Float32Array.from(pooled), note: null };
  const lost = unseenRegions(mask, block);
  if (lost) {
    const note = `${lost} region${lost > 1 ? "s" : ""} of the mask would vanish at latent resolution; it was reduced by max`;
    return { cells: Float32Array.from(pooled), note: `${note} instead of nearest` };
  }
  const nearest = new Float32Array(cells * cells);
  for (let i = 0; i < nearest.length; i++) nearest[i] = mask.data[corner(i, cells, block, mask.width)];
  let [unseen, all] = [0, 0];
  mask.data.forEach((marked, place) => {
    if (!marked) return;
    const cell = Math.floor(place / mask.width / block) * cells + Math.floor((place % mask.width) / block);
    all++;
    if (!nearest[cell]) unseen++;
  });
  const words = `${unseen} of ${all} mask pixels lie in latent cells that nearest leaves unmasked`;
  return { cells: nearest, note: unseen ? `${words} (mask_reduce max covers them)` : null };
}

/**
 * 1 for each block that holds a 1, [cells, cells].
 * @param {Grid} mask [S, S]
 * @param {number} cells
 */
export function blockMaxima(mask, cells) {
  const block = mask.width / cells;
  const pooled = new Uint8Array(cells * cells);
  for (let y = 0, i = 0; y < mask.height; y++) {
    const row = Math.floor(y / block) * cells;
    for (let x = 0; x < mask.width; x++, i++) if (mask.data[i]) pooled[row + Math.floor(x / block)] = 1;
  }
  return pooled;
}

/** @param {number} cell @param {number} cells a row @param {number} block @param {number} width */
function corner(cell, cells, block, width) {
  return Math.floor(cell / cells) * block * width + (cell % cells) * block;
}

/** The number of 8-connected regions without a pixel at multiples of `block`. @param {Grid} mask @param {number} block */
function unseenRegions(mask, block) {
  const { numbers, boxes } = components(mask);
  const seen = new Set();
  for (let y = 0; y < mask.height; y += block) {
    for (let x = 0; x < mask.width; x += block) seen.add(numbers[y * mask.width + x]);
  }
  seen.delete(0);
  return boxes.length - 1 - seen.size;
}
