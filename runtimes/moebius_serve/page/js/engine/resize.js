// Pillow's Lanczos resize of 8-bit RGB, to the bit: libImaging/Resample.c. It runs in Node too.

const f32 = Math.fround;
const PRECISION_BITS = 32 - 8 - 2; // of a coefficient's fraction
const SUPPORT = 3; // source pixels on both sides, at scale 1

/** @typedef {{data: Uint8Array, height: number, width: number}} Rgb three bytes a pixel, row by row */
/** @typedef {[number, number, number, number]} Box left, top, right, bottom, in pixels of the source */
/** @typedef {{first: Int32Array, count: Int32Array, weights: Int32Array, stride: number}} Kernel */

/**
 * The part `box` of a picture at another size. Pixels are copied where the box has whole edges and the result's size.
 * @param {Rgb} source
 * @param {number} height of the result
 * @param {number} width of the result
 * @param {Box} box
 * @returns {Rgb}
 */
export function resizedRgb(source, height, width, box) {
  // Rounding may have put an edge a hair outside.
  const [left, top] = [Math.max(0, box[0]), Math.max(0, box[1])];
  const [right, bottom] = [Math.min(box[2], source.width), Math.min(box[3], source.height)];
  if (right - left === width && bottom - top === height && Number.isInteger(left) && Number.isInteger(top)) {
    return cut(source, top, left, height, width);
  }
  // Pillow holds the box in float32. An axis whose box is all of it and whose size stays is not resampled.
  const [x0, y0, x1, y1] = [f32(left), f32(top), f32(right), f32(bottom)];
  const rows = height !== source.height || y0 !== 0 || y1 !== height ? kernel(source.height, y0, y1, height) : null;
  const columns = width !== source.width || x0 !== 0 || x1 !== width ? kernel(source.width, x0, x1, width) : null;
  const wide = columns ? acrossColumns(source, columns, width, rows ? usedRows(rows) : [0, height]) : source;
  return rows ? acrossRows(wide, rows, height, columns ? rows.first[0] : 0) : wide;
}

/** @param {Rgb} source @param {number} top @param {number} left @param {number} height @param {number} width @returns {Rgb} */
function cut(source, top, left, height, width) {
  const data = new Uint8Array(height * width * 3);
  for (let y = 0; y < height; y++) {
    const start = ((top + y) * source.width + left) * 3;
    data.set(source.data.subarray(start, start + width * 3), y * width * 3);
  }
  return { data, height, width };
}

/**
 * The source pixels and weights of each pixel of an axis; weights in fixed point, `stride` of them a pixel.
 * @param {number} length of the source
 * @param {number} start of the box, float32
 * @param {number} end of the box, float32
 * @param {number} size of the result
 * @returns {Kernel}
 */
function kernel(length, start, end, size) {
  const scale = f32(end - start) / size;
  const shrunk = Math.max(1, scale);
  const support = SUPPORT * shrunk;
  const stride = Math.ceil(support) * 2 + 1;
  const [first, count] = [new Int32Array(size), new Int32Array(size)];
  const weights = new Int32Array(size * stride);
  const exact = new Float64Array(stride);
  for (let i = 0; i < size; i++) {
    const center = start + (i + 0.5) * scale;
    const low = Math.max(0, Math.trunc(center - support + 0.5));
    const used = Math.min(length, Math.trunc(center + support + 0.5)) - low;
    let sum = 0;
    for (let k = 0; k < used; k++) {
      exact[k] = lanczos((k + low - center + 0.5) * (1 / shrunk));
      sum += exact[k];
    }
    for (let k = 0; k < used; k++) {
      const fixed = (sum ? exact[k] / sum : exact[k]) * (1 << PRECISION_BITS);
      weights[i * stride + k] = Math.trunc(fixed < 0 ? fixed - 0.5 : fixed + 0.5);
    }
    first[i] = low;
    count[i] = used;
  }
  return { first, count, weights, stride };
}

/** @param {number} x */
function lanczos(x) {
  return x >= -SUPPORT && x < SUPPORT ? sinc(x) * sinc(x / SUPPORT) : 0;
}

/** @param {number} x */
function sinc(x) {
  return x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI);
}

/** The rows that a vertical pass reads. @param {Kernel} rows @returns {[number, number]} */
function usedRows({ first, count }) {
  const last = first.length - 1;
  return [first[0], first[last] + count[last]];
}

/** @param {Rgb} source @param {Kernel} kernel @param {number} width @param {[number, number]} rows @returns {Rgb} */
function acrossColumns(source, { first, count, weights, stride }, width, [top, bottom]) {
  const data = new Uint8Array((bottom - top) * width * 3);
  let out = 0;
  for (let y = top; y < bottom; y++) {
    for (let x = 0; x < width; x++) {
      let at = (y * source.width + first[x]) * 3;
      let [red, green, blue] = [HALF, HALF, HALF];
      const end = x * stride + count[x];
      for (let k = x * stride; k < end; k++, at += 3) {
        red += source.data[at] * weights[k];
        green += source.data[at + 1] * weights[k];
        blue += source.data[at + 2] * weights[k];
      }
      data[out++] = clipped(red);
      data[out++] = clipped(green);
      data[out++] = clipped(blue);
    }
  }
  return { data, height: bottom - top, width };
}

/** @param {Rgb} source @param {Kernel} kernel @param {number} height @param {number} above rows that `source` lacks @returns {Rgb} */
function acrossRows(source, { first, count, weights, stride }, height, above) {
  const line = source.width * 3;
  const data = new Uint8Array(height * line);
  const sums = new Float64Array(line);
  for (let y = 0; y < height; y++) {
    sums.fill(HALF);
    for (let k = 0; k < count[y]; k++) {
      const weight = weights[y * stride + k];
      const start = (first[y] - above + k) * line;
      for (let i = 0; i < line; i++) sums[i] += source.data[start + i] * weight;
    }
    for (let i = 0; i < line; i++) data[y * line + i] = clipped(sums[i]);
  }
  return { data, height, width: source.width };
}

const HALF = 1 << (PRECISION_BITS - 1); // rounds to the nearest

/** @param {number} sum in fixed point */
function clipped(sum) {
  const value = Math.floor(sum / (1 << PRECISION_BITS));
  return value < 0 ? 0 : value > 255 ? 255 : value;
}
