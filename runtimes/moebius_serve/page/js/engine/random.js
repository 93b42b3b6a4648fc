// NumPy's `RandomState`: the same starting noise for a seed as moebius_runtime draws. No page here: it runs in Node too.

const SIZE = 624;
const MIDDLE = 397;

/** The generator MT19937 (Matsumoto and Nishimura, 1998), seeded and read as NumPy's `RandomState`. */
export class RandomState {
  /** @param {number} seed a whole number from 0 to 2^32 - 1 */
  constructor(seed) {
    if (!Number.isInteger(seed) || seed < 0 || seed > 0xffffffff) {
      throw new RangeError(`seed is ${seed}; expected a whole number from 0 to 4294967295`);
    }
    const state = new Uint32Array(SIZE);
    state[0] = seed;
    for (let i = 1; i < SIZE; i++) {
      state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
    }
    this._state = state;
    this._position = SIZE;
    /** @type {number | null} */
    this._kept = null;
  }

  /**
   * The next 32 random bits.
   * @returns {number}
   */
  bits() {
    if (this._position === SIZE) this._advance();
    let y = this._state[this._position++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    y ^= y >>> 18;
    return y >>> 0;
  }

  /**
   * A number from 0 to below 1 with 53 random bits.
   * @returns {number}
   */
  uniform() {
    const high = this.bits() >>> 5;
    return (high * 67108864 + (this.bits() >>> 6)) / 9007199254740992;
  }

  /**
   * A number of N(0, 1), by the polar method of Marsaglia and Bray (1964), which gives two at a time.
   * @returns {number}
   */
  normal() {
    if (this._kept !== null) {
      const kept = this._kept;
      this._kept = null;
      return kept;
    }
    let x, y, square;
    do {
      x = 2 * this.uniform() - 1;
      y = 2 * this.uniform() - 1;
      square = x * x + y * y;
    } while (square >= 1 || square === 0);
    const factor = Math.sqrt((-2 * Math.log(square)) / square);
    this._kept = factor * x;
    return factor * y;
  }

  /**
   * Random signs, as `randint(0, 2, length, int8) * 2 - 1`: four from each 32 bits, the lowest bit of every byte.
   * @param {number} length
   * @returns {Int8Array} of -1 and 1
   */
  signs(length) {
    const signs = new Int8Array(length);
    let bits = 0;
    for (let i = 0; i < length; i++) {
      bits = i % 4 ? bits >>> 8 : this.bits();
      signs[i] = (bits & 1) * 2 - 1;
    }
    return signs;
  }

  _advance() {
    const state = this._state;
    for (let i = 0; i < SIZE; i++) {
      const y = (state[i] & 0x80000000) | (state[(i + 1) % SIZE] & 0x7fffffff);
      state[i] = state[(i + MIDDLE) % SIZE] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    this._position = 0;
  }
}

/**
 * N(0, 1) noise plus `offset` * N(0, 1) per channel, as `moebius_runtime.sampling.schedule.initial_noise`.
 * @param {number} seed 0 to 2^32 - 1
 * @param {[number, number, number, number]} shape [B, channels, h, w]; its elements are drawn first, then the offsets
 * @param {number} offset standard deviation of the offset
 * @returns {Float32Array} in row-major order
 */
export function initialNoise(seed, shape, offset = 0.0357) {
  return noiseStream(seed, shape, offset).next().value;
}

/**
 * Noise without end from one seed: the first array is `initialNoise`, the others follow in the same stream.
 * @param {number} seed
 * @param {[number, number, number, number]} shape
 * @param {number} offset
 * @returns {Generator<Float32Array, never, void>}
 */
export function* noiseStream(seed, shape, offset = 0.0357) {
  const stream = new RandomState(seed);
  const [batch, channels, height, width] = shape;
  for (;;) {
    const noise = new Float64Array(batch * channels * height * width);
    for (let i = 0; i < noise.length; i++) noise[i] = stream.normal();
    for (let plane = 0; plane < batch * channels; plane++) {
      const shift = offset * stream.normal();
      const start = plane * height * width;
      for (let i = start; i < start + height * width; i++) noise[i] += shift;
    }
    yield Float32Array.from(noise);
  }
}
