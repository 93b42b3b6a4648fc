// A square that the network fills, and the runs of squares that do not overlap. As moebius_runtime.regions.squares.

import { empty } from "./cells.js";
import { windowOf } from "./crop.js";

/** @typedef {import("./cells.js").Grid} Grid */
/** @typedef {import("./crop.js").Crop} Crop */
/** @typedef {import("./crop.js").Rect} Rect */
/** @typedef {import("./crop.js").Shape} Shape */
/**
 * A crop, and the part of the mask that it fills: the mask's pixels in some cells.
 * @typedef {object} Square
 * @property {Crop} crop
 * @property {number} cell side of a cell in pixels; cells are counted from the picture's corner
 * @property {number} top row of the first cell
 * @property {number} left column of the first cell
 * @property {Grid} cells which cells it owns
 */

/**
 * A square that owns all of the mask.
 * @param {Crop} crop
 * @param {Shape} shape of the picture
 * @returns {Square}
 */
export function wholeSquare(crop, { height, width }) {
  const cells = { data: new Uint8Array([1]), height: 1, width: 1 };
  return { crop, cell: Math.max(height, width), top: 0, left: 0, cells };
}

/**
 * The mask's pixels that a square fills.
 * @param {Square} square
 * @param {Grid} mask the whole
 * @returns {Grid} of the crop's window
 */
export function ownPixels({ crop, cell, top, left, cells }, mask) {
  const window = windowOf(crop, mask);
  const owned = empty(window.bottom - window.top, window.right - window.left);
  const [first, last] = [Math.max(window.top, top * cell), Math.min(window.bottom, (top + cells.height) * cell)];
  const [start, end] = [Math.max(window.left, left * cell), Math.min(window.right, (left + cells.width) * cell)];
  for (let y = first; y < last; y++) {
    const row = (Math.floor(y / cell) - top) * cells.width - left;
    const out = (y - window.top) * owned.width - window.left;
    for (let x = start; x < end; x++) {
      if (mask.data[y * mask.width + x] && cells.data[row + Math.floor(x / cell)]) owned.data[out + x] = 1;
    }
  }
  return owned;
}

/**
 * The squares in their order, cut into runs in which no two share a pixel of the picture.
 * @param {Square[]} squares
 * @param {Shape} shape of the picture
 * @returns {Square[][]}
 */
export function apart(squares, shape) {
  /** @type {Square[][]} */
  const runs = [];
  for (const square of squares) {
    const window = windowOf(square.crop, shape);
    const run = runs[runs.length - 1];
    if (!run || run.some(({ crop }) => overlap(window, windowOf(crop, shape)))) runs.push([square]);
    else run.push(square);
  }
  return runs;
}

/** @param {Rect} one @param {Rect} other */
export function overlap(one, other) {
  return one.top < other.bottom && other.top < one.bottom && one.left < other.right && other.left < one.right;
}
