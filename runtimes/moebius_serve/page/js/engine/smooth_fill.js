// Smooth values for unknown pixels, from the known ones only: push-pull with relaxation, with the roundings of
// moebius_runtime.regions.smooth_fill, where the source is named. It runs in Node too.

const f32 = Math.fround;

const RELAXATIONS = 8; // Jacobi steps at each level but that of the pixels themselves
const RELAXED_SIDE = 1024; // larger levels are not relaxed
const EMPTY = 127.5; // where nothing at all is known: mid-grey

/** @typedef {import("./resize.js").Rgb} Rgb */
/** @typedef {import("./cells.js").Grid} Grid */
/**
 * Values in rows of pixels, 0 where nothing is known.
 * @typedef {{data: Float32Array, height: number, width: number, channels: number}} Level
 */

/**
 * The picture with its unknown pixels replaced by smooth values; known ones are copied. Mid-grey where none is known.
 * @param {Rgb} pixels
 * @param {Grid} unknown
 * @returns {Rgb} new
 */
export function filledPixels(pixels, unknown) {
  const { height, width } = pixels;
  const filled = { data: pixels.data.slice(), height, width };
  if (!unknown.data.includes(1)) return filled;
  const known = unknown.data.map((value) => 1 - value);
  const { means, count } = halved({ ...pixels, channels: 3 }, known);
  const coarse = filledMeans(means, count, EMPTY);
  const row = new Float32Array(width * 3);
  for (let y = 0; y < height; y++) {
    const marked = unknown.data.subarray(y * width, (y + 1) * width);
    if (!marked.includes(1)) continue;
    doubledRow(coarse, y, row);
    for (let x = 0; x < width; x++) {
      if (!marked[x]) continue;
      for (let c = 0; c < 3; c++) filled.data[(y * width + x) * 3 + c] = Math.trunc(f32(row[x * 3 + c] + 0.5));
    }
  }
  return filled;
}

/**
 * Latents with their unknown cells replaced by smooth values; zero where no cell is known.
 * @param {Float32Array} cells [C, side, side]
 * @param {Uint8Array} unknown [side, side]
 * @param {number} side
 * @returns {Float32Array} new
 */
export function filledCells(cells, unknown, side) {
  if (!unknown.includes(1)) return cells.slice();
  const [area, channels] = [side * side, cells.length / (side * side)];
  const means = new Float32Array(cells.length); // [C, s, s] -> [s, s, C]
  for (let i = 0; i < area; i++) {
    if (!unknown[i]) for (let c = 0; c < channels; c++) means[i * channels + c] = cells[c * area + i];
  }
  const count = Float32Array.from(unknown, (value) => 1 - value);
  const { data } = filledMeans({ data: means, height: side, width: side, channels }, count, 0);
  const filled = new Float32Array(cells.length); // [s, s, C] -> [C, s, s]
  for (let i = 0; i < area; i++) for (let c = 0; c < channels; c++) filled[c * area + i] = data[i * channels + c];
  return filled;
}

/**
 * The means where their count is above 0, smooth values elsewhere.
 * @param {Level} means
 * @param {Float32Array} count
 * @param {number} nothing where nothing is known
 * @returns {Level}
 */
function filledMeans(means, count, nothing) {
  const { height, width, channels } = means;
  const known = Uint8Array.from(count, (value) => (value > 0 ? 1 : 0));
  if (!known.includes(0)) return means;
  if (height === 1 && width === 1) return { ...means, data: new Float32Array(channels).fill(nothing) };
  const half = halved(means, known);
  const coarse = filledMeans(half.means, half.count, nothing);
  const data = new Float32Array(means.data.length);
  for (let y = 0; y < height; y++) doubledRow(coarse, y, data.subarray(y * width * channels, (y + 1) * width * channels));
  for (let i = 0; i < data.length; i++) if (known[Math.floor(i / channels)]) data[i] = means.data[i];
  const filled = { ...means, data };
  return Math.max(height, width) <= RELAXED_SIDE ? relaxed(filled, known) : filled;
}

/**
 * Jacobi steps of the Laplace equation on what is not known.
 * @param {Level} level
 * @param {Uint8Array} known
 * @returns {Level}
 */
function relaxed({ data, height, width, channels }, known) {
  const line = width * channels;
  /** @type {Float32Array[]} */
  let [now, next] = [data, data.slice()];
  for (let step = 0; step < RELAXATIONS; step++) {
    for (let y = 0, place = 0; y < height; y++) {
      const up = y > 0 ? -line : 0;
      const down = y < height - 1 ? line : 0;
      for (let x = 0; x < width; x++, place++) {
        if (known[place]) continue;
        const left = x > 0 ? -channels : 0;
        const right = x < width - 1 ? channels : 0;
        for (let i = place * channels; i < (place + 1) * channels; i++) {
          next[i] = f32(f32(f32(now[i + up] + now[i + down]) + now[i + left]) + now[i + right]) * 0.25;
        }
      }
    }
    [now, next] = [next, now];
  }
  return { data: now, height, width, channels };
}

/**
 * Means of the known ones of each 2x2 block, and how many there are.
 * @param {{data: ArrayLike<number>, height: number, width: number, channels: number}} values
 * @param {Uint8Array} known
 * @returns {{means: Level, count: Float32Array}}
 */
function halved({ data, height, width, channels }, known) {
  const [rows, columns] = [Math.ceil(height / 2), Math.ceil(width / 2)];
  const means = new Float32Array(rows * columns * channels);
  const count = new Float32Array(rows * columns);
  /** @param {number} y @param {number} x */
  const at = (y, x) => (y < height && x < width && known[y * width + x] ? y * width + x : -1);
  for (let y = 0, out = 0; y < rows; y++) {
    for (let x = 0; x < columns; x++, out++) {
      const [a, b] = [at(2 * y, 2 * x), at(2 * y + 1, 2 * x)];
      const [c, d] = [at(2 * y, 2 * x + 1), at(2 * y + 1, 2 * x + 1)];
      const number = Number(a >= 0) + Number(b >= 0) + Number(c >= 0) + Number(d >= 0);
      count[out] = number;
      if (!number) continue;
      for (let k = 0; k < channels; k++) {
        /** @param {number} place */
        const value = (place) => (place < 0 ? 0 : data[place * channels + k]);
        means[out * channels + k] = f32(f32(value(a) + value(b)) + f32(value(c) + value(d))) / number;
      }
    }
  }
  return { means: { data: means, height: rows, width: columns, channels }, count };
}

/**
 * One row of the bilinear enlargement to twice the size, each coarse cell lying over a 2x2 block.
 * @param {Level} coarse
 * @param {number} y the row
 * @param {Float32Array} row takes it: as many pixels as are wanted, at most twice the coarse ones
 */
function doubledRow({ data, height, width, channels }, y, row) {
  const own = y >> 1;
  const other = y % 2 ? Math.min(own + 1, height - 1) : Math.max(own - 1, 0);
  const line = width * channels;
  const tall = new Float32Array(line);
  for (let i = 0; i < line; i++) tall[i] = mixed(data[other * line + i], data[own * line + i]);
  for (let x = 0; x * channels < row.length; x++) {
    const here = x >> 1;
    const beside = x % 2 ? Math.min(here + 1, width - 1) : Math.max(here - 1, 0);
    for (let c = 0; c < channels; c++) row[x * channels + c] = mixed(tall[beside * channels + c], tall[here * channels + c]);
  }
}

/** @param {number} far @param {number} near */
function mixed(far, near) {
  return f32(0.25 * far) + f32(0.75 * near);
}
