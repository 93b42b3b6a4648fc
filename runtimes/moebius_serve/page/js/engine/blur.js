// Pillow's box blur and Gaussian blur of 8-bit grey, to the bit: libImaging/BoxBlur.c. It runs in Node too.

const f32 = Math.fround;

const PASSES = 3; // box blurs that approximate a Gaussian

/** @typedef {{data: Uint8Array, height: number, width: number}} Grey one byte a pixel */

/**
 * @param {Grey} grey
 * @param {number} radius of the box: 2 * radius + 1 pixels across, 0 or more, maybe not whole
 * @param {number} passes
 * @returns {Grey}
 */
export function boxBlurred(grey, radius, passes = 1) {
  if (f32(radius) === 0) return grey;
  let across = grey;
  for (let pass = 0; pass < passes; pass++) across = blurredRows(across, f32(radius));
  let down = transposed(across);
  for (let pass = 0; pass < passes; pass++) down = blurredRows(down, f32(radius));
  return transposed(down);
}

/**
 * @param {Grey} grey
 * @param {number} radius standard deviation in pixels
 * @returns {Grey}
 */
export function gaussianBlurred(grey, radius) {
  return boxBlurred(grey, boxRadius(f32(radius)), PASSES);
}

/**
 * Radius of three boxes that together have the Gaussian's variance: Gwosdek et al. 2011, equations 7, 11 and 14.
 * @param {number} radius float32
 */
function boxRadius(radius) {
  const variance = f32(f32(radius * radius) / PASSES);
  const length = f32(Math.sqrt(12 * variance + 1));
  const whole = f32(Math.floor((length - 1) / 2));
  const above = f32(whole + 1);
  const numerator = f32(f32(f32(2 * whole) + 1) * f32(f32(whole * above) - f32(3 * variance)));
  return f32(whole + f32(numerator / f32(6 * f32(variance - f32(above * above)))));
}

/** @param {Grey} grey @param {number} radius float32 @returns {Grey} */
function blurredRows({ data, height, width }, radius) {
  const reach = Math.trunc(radius);
  const whole = Math.trunc(f32(16777216 / f32(f32(radius * 2) + 1))); // weight of a pixel, of 2^24
  const rest = Math.floor((16777216 - (reach * 2 + 1) * whole) / 2); // of the pixel beyond on either side
  const last = width - 1;
  const result = new Uint8Array(data.length);
  for (let y = 0; y < height; y++) {
    const row = data.subarray(y * width, (y + 1) * width);
    let sum = row[0] * (reach + 1);
    for (let x = 0; x < reach; x++) sum += row[Math.min(x, last)];
    for (let x = 0; x < width; x++) {
      const before = row[Math.max(0, x - reach - 1)];
      sum += row[Math.min(last, x + reach)] - before;
      const bulk = sum * whole + (before + row[Math.min(last, x + reach + 1)]) * rest;
      result[y * width + x] = Math.floor((bulk + 8388608) / 16777216);
    }
  }
  return { data: result, height, width };
}

/** @param {Grey} grey @returns {Grey} */
function transposed({ data, height, width }) {
  const result = new Uint8Array(data.length);
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) result[x * height + y] = data[y * width + x];
  return { data: result, height: width, width: height };
}
