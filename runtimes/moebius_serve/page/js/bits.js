// Binary masks as arrays: packing for the history, growing and shrinking. No page here: these run in Node too.

/**
 * Packs 0/1 values into bits, eight to a byte, the first in the lowest bit.
 * @param {Uint8Array} values
 * @returns {Uint8Array}
 */
export function pack(values) {
  const bits = new Uint8Array(Math.ceil(values.length / 8));
  for (let i = 0; i < values.length; i++) if (values[i]) bits[i >> 3] |= 1 << (i & 7);
  return bits;
}

/**
 * The inverse of `pack`.
 * @param {Uint8Array} bits
 * @param {number} length
 * @returns {Uint8Array}
 */
export function unpack(bits, length) {
  const values = new Uint8Array(length);
  for (let i = 0; i < length; i++) values[i] = (bits[i >> 3] >> (i & 7)) & 1;
  return values;
}

/**
 * Grows the ones of a mask by `pixels` in each direction, diagonally too.
 * @param {Uint8Array} values 0 and 1, row by row
 * @param {number} width
 * @param {number} pixels
 * @returns {Uint8Array} a new array
 */
export function grown(values, width, pixels) {
  const height = values.length / width;
  return spread(spread(values, height, width, width, 1, pixels), width, height, 1, width, pixels);
}

/**
 * Shrinks the ones of a mask by `pixels`; beyond the border counts as ones, so that a mask at the border stays there.
 * @param {Uint8Array} values
 * @param {number} width
 * @param {number} pixels
 * @returns {Uint8Array} a new array
 */
export function shrunk(values, width, pixels) {
  return inverted(grown(inverted(values), width, pixels));
}

/**
 * @param {Uint8Array} values
 * @returns {Uint8Array}
 */
export function inverted(values) {
  return values.map((value) => 1 - value);
}

/**
 * Along one axis: 1 wherever a 1 lies within `pixels`.
 * @param {Uint8Array} values
 * @param {number} lines
 * @param {number} length of a line
 * @param {number} lineStep from a line to the next
 * @param {number} step from a value to the next of its line
 * @param {number} pixels
 */
function spread(values, lines, length, lineStep, step, pixels) {
  const result = new Uint8Array(values.length);
  for (let line = 0; line < lines; line++) {
    const start = line * lineStep;
    let last = -Infinity;
    for (let i = 0; i < length; i++) {
      if (values[start + i * step]) last = i;
      if (i - last <= pixels) result[start + i * step] = 1;
    }
    last = Infinity;
    for (let i = length - 1; i >= 0; i--) {
      if (values[start + i * step]) last = i;
      if (last - i <= pixels) result[start + i * step] = 1;
    }
  }
  return result;
}
