// A crop at the network's size, and the result back at the picture's. What the crop holds beyond the picture is filled
// by reflection at the network's scale. As moebius_runtime.regions.resampling. It runs in Node too.

import { inside, span } from "./crop.js";
import { resizedRgb } from "./resize.js";

/** @typedef {import("./crop.js").Crop} Crop */
/** @typedef {import("./crop.js").Shape} Shape */
/** @typedef {import("./crop.js").Span} Span */
/** @typedef {import("./resize.js").Rgb} Rgb */
/** @typedef {import("./cells.js").Grid} Grid */

/**
 * A crop's window as the network sees the crop: Lanczos, and reflection beyond the picture.
 * @param {Rgb} rgb the window
 * @param {Crop} crop
 * @param {Shape} shape of the picture
 * @param {number} size the network's side
 * @returns {Rgb} [size, size]
 */
export function toNetwork(rgb, crop, shape, size) {
  const parts = inside(crop, shape);
  const spans = parts.map((part) => span(part, crop.side, size));
  const scale = crop.side / size;
  const [[top, bottom], [left, right]] = spans.map(([first, last], axis) => [
    first * scale - parts[axis][0],
    last * scale - parts[axis][0],
  ]);
  const [rows, columns] = spans.map(([first, last]) => last - first);
  const resized = resizedRgb(rgb, rows, columns, [left, top, right, bottom]);
  if (rows === size && columns === size) return resized;
  const [fromRow, fromColumn] = spans.map((covered) => reflected(covered, size));
  const data = new Uint8Array(size * size * 3);
  for (let y = 0; y < size; y++) {
    for (let x = 0; x < size; x++) {
      const from = (fromRow[y] * columns + fromColumn[x]) * 3;
      data.set(resized.data.subarray(from, from + 3), (y * size + x) * 3);
    }
  }
  return { data, height: size, width: size };
}

/**
 * The mask of a crop's window, as `toNetwork`: 1 where any pixel is.
 * @param {Grid} mask
 * @param {Crop} crop
 * @param {Shape} shape
 * @param {number} size
 * @returns {Grid} [size, size]
 */
export function maskToNetwork(mask, crop, shape, size) {
  const [rows, columns] = inside(crop, shape).map((part, axis) =>
    sources(part, crop.side, size, axis ? mask.width : mask.height),
  );
  const tall = new Uint8Array(size * mask.width); // [size, w]
  for (let y = 0; y < size; y++) {
    const line = tall.subarray(y * mask.width, (y + 1) * mask.width);
    for (let from = rows[y][0]; from < rows[y][1]; from++) {
      for (let x = 0; x < mask.width; x++) line[x] |= mask.data[from * mask.width + x];
    }
  }
  const data = new Uint8Array(size * size);
  for (let y = 0; y < size; y++) {
    for (let x = 0; x < size; x++) {
      for (let from = columns[x][0]; from < columns[x][1]; from++) data[y * size + x] |= tall[y * mask.width + from];
    }
  }
  return { data, height: size, width: size };
}

/**
 * The pixels of an axis that each network pixel takes: those from its edge to the next one's, or its edge's own.
 * @param {Span} part of the crop in the picture
 * @param {number} side of the crop
 * @param {number} size the network's side
 * @param {number} length of the window
 * @returns {Span[]}
 */
function sources(part, side, size, length) {
  const covered = span(part, side, size);
  /** @type {number[]} */
  const edges = [];
  for (let i = covered[0]; i < covered[1]; i++) edges.push(Math.floor((i * side) / size) - part[0]);
  edges[0] = 0;
  const taken = edges.map((edge, i) => /** @type {Span} */ ([edge, Math.max(edge + 1, edges[i + 1] ?? length)]));
  return reflected(covered, size).map((i) => taken[i]);
}

/**
 * The generated square, resampled to the crop's window.
 * @param {Rgb} generated [size, size]
 * @param {Crop} crop
 * @param {Shape} shape
 * @returns {Rgb}
 */
export function fromNetwork(generated, crop, shape) {
  const [[top, bottom], [left, right]] = inside(crop, shape);
  const scale = generated.height / crop.side;
  return resizedRgb(generated, bottom - top, right - left, [left * scale, top * scale, right * scale, bottom * scale]);
}

/**
 * For each network pixel, which pixel of the span it shows, from 0: itself or its mirror image.
 * @param {Span} covered
 * @param {number} size
 * @returns {number[]}
 */
function reflected([first, last], size) {
  const period = 2 * (last - first - 1);
  return Array.from({ length: size }, (_, i) => {
    const offset = Math.abs(i - first) % period;
    return offset < last - first ? offset : period - offset;
  });
}
