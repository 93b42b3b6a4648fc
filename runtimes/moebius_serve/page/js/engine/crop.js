// Squares of picture pixels, which may reach beyond the picture, and the part of them inside: the window.
// As moebius_runtime.regions.crop. It runs in Node too.

import { InputError } from "./errors.js";

const MIN_PIXELS = 8; // of the network's picture: one latent cell

/** @typedef {{height: number, width: number}} Shape of a picture */
/** @typedef {{left: number, top: number, side: number}} Crop a square of picture pixels */
/** @typedef {{top: number, left: number, bottom: number, right: number}} Rect the last two exclusive */
/** @typedef {[number, number]} Span first and last (exclusive) */

/**
 * The square around a whole picture, with the picture in its middle.
 * @param {Shape} shape
 * @param {number} size the network's side
 * @returns {Crop}
 * @throws {InputError} the picture would be reduced to less than one latent cell across
 */
export function wholeCrop(shape, size) {
  const side = Math.max(shape.height, shape.width);
  const crop = { left: 0 - Math.floor((side - shape.width) / 2), top: 0 - Math.floor((side - shape.height) / 2), side };
  for (const part of inside(crop, shape)) {
    const [first, last] = span(part, side, size);
    if (last - first < MIN_PIXELS) {
      throw new InputError(
        `a square of ${side} pixels, brought to ${size}, would leave ${Math.max(0, last - first)} pixels of the shorter ` +
          `side of a ${shape.width}x${shape.height} picture; expected ${MIN_PIXELS} or more. Use mode best.`,
      );
    }
  }
  return crop;
}

/**
 * The largest side of a crop of which one latent cell across the picture is left. A crop that is not of the network's
 * size can lose one more pixel to rounding.
 * @param {Shape} shape
 * @param {number} size the network's side
 */
export function largestSide({ height, width }, size) {
  const [shorter, longer] = [Math.min(height, width), Math.max(height, width)];
  const side = Math.max(1, Math.min(longer, Math.floor((shorter * size) / (MIN_PIXELS + 1))));
  return shorter >= MIN_PIXELS && longer >= size ? Math.max(side, size) : side;
}

/**
 * The part of a picture that lies inside the crop.
 * @param {Crop} crop
 * @param {Shape} shape
 * @returns {Rect}
 */
export function windowOf(crop, shape) {
  const [[top, bottom], [left, right]] = inside(crop, shape);
  return { top: crop.top + top, left: crop.left + left, bottom: crop.top + bottom, right: crop.left + right };
}

/**
 * The rows and columns of a crop that lie in the picture, from its corner.
 * @param {Crop} crop
 * @param {Shape} shape
 * @returns {[Span, Span]}
 */
export function inside(crop, shape) {
  return [
    [Math.max(0, -crop.top), Math.min(crop.side, shape.height - crop.top)],
    [Math.max(0, -crop.left), Math.min(crop.side, shape.width - crop.left)],
  ];
}

/**
 * The network pixels wholly inside the part of a crop that is in the picture.
 * @param {Span} part
 * @param {number} side of the crop
 * @param {number} size the network's side
 * @returns {Span}
 */
export function span(part, side, size) {
  return [Math.ceil((part[0] * size) / side), Math.floor((part[1] * size) / side)];
}
