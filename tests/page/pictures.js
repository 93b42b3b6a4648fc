// The network of simple functions, the pictures and the masks of scripts/page_pictures_golden.py, for the engine's tests.

const f32 = Math.fround;
const CHANNELS = 4;

/** @typedef {{data: Float32Array, dims: number[]}} Tensor */

/** @param {Tensor} image */
function encoder({ data, dims }) {
  const side = dims[2] / 8;
  const latent = new Float32Array(CHANNELS * side * side);
  for (let c = 0, i = 0; c < CHANNELS; c++) {
    for (let y = 0; y < side; y++) {
      for (let x = 0; x < side; x++, i++) {
        let total = 0;
        for (let k = 0; k < 8; k++) {
          total = f32(total + data[((c % 3) * dims[2] + 8 * y + k) * dims[2] + 8 * x + ((3 * k + c) % 8)]);
        }
        latent[i] = total * 0.125;
      }
    }
  }
  return { name: "latent", data: latent, dims: [1, CHANNELS, side, side] };
}

/** @param {Tensor} sample @param {BigInt64Array} timestep @param {number} scale */
function unet({ data, dims }, timestep, scale) {
  const area = dims[2] * dims[3];
  const shift = f32(f32(f32(Number(timestep[0]) / 1000 - 0.4) * 0.5) + f32(0.05 * scale));
  const predicted = new Float32Array(CHANNELS * area);
  for (let i = 0; i < predicted.length; i++) {
    const [mask, known] = [data[CHANNELS * area + (i % area)], data[(CHANNELS + 1) * area + i]];
    const mixed = f32(f32(f32(f32(0.3) * data[i]) - f32(f32(0.2) * known)) + f32(f32(0.1) * mask));
    predicted[i] = mixed + shift;
  }
  return { name: "noise_pred", data: predicted, dims: [1, CHANNELS, dims[2], dims[3]] };
}

/** @param {Tensor} latent @param {number} detail */
function decoder({ data, dims }, detail) {
  const [side, size] = [dims[2], dims[2] * 8];
  const image = new Float32Array(3 * size * size);
  for (let c = 0, i = 0; c < 3; c++) {
    for (let y = 0; y < size; y++) {
      for (let x = 0; x < size; x++, i++) {
        const cell = (y >> 3) * side + (x >> 3);
        const pattern = f32((((y * 7 + x * 3 + c) % 11) - 5) / 10);
        const fine = f32(f32(f32(detail) * pattern) * data[3 * side * side + cell]);
        image[i] = f32(f32(0.6) * data[c * side * side + cell]) + fine;
      }
    }
  }
  return { name: "image", data: image, dims: [1, 3, size, size] };
}

/** @param {Tensor} latent */
function lower({ data, dims }) {
  const [side, wide] = [dims[2], dims[2] * 2];
  const features = new Float32Array(2 * wide * wide);
  for (let f = 0, i = 0; f < 2; f++) {
    for (let y = 0; y < wide; y++) {
      for (let x = 0; x < wide; x++, i++) {
        const cell = (y >> 1) * side + (x >> 1);
        features[i] = f32(0.5 * data[f * side * side + cell]) + f32(0.25 * data[(2 + f) * side * side + cell]);
      }
    }
  }
  return { name: "features", data: features, dims: [1, 2, wide, wide] };
}

/** @param {Tensor} features @param {Tensor} overview @param {Tensor} inside */
function upper(features, overview, inside) {
  const [, , height, width] = features.dims;
  const small = overview.dims[2];
  const image = new Float32Array(3 * 16 * height * width);
  for (let c = 0, i = 0; c < 3; c++) {
    for (let y = 0; y < 4 * height; y++) {
      for (let x = 0; x < 4 * width; x++, i++) {
        const [row, column] = [y >> 2, x >> 2];
        const block = (row % small) * small + (column % small);
        const whole = f32(f32(0.1) * overview.data[(c % 2) * small * small + block]);
        const near = f32(f32(0.5 * features.data[((c % 2) * height + row) * width + column]) + whole);
        image[i] = near + f32(f32(0.05) * inside.data[block]);
      }
    }
  }
  return { name: "image", data: image, dims: [1, 3, 4 * height, 4 * width] };
}

/** Runs the functions as the graphs of a bundle, and notes which. */
export class SimpleSessions {
  constructor() {
    /** @type {string[]} */
    this.runs = [];
  }

  /** @param {string} graph @param {Record<string, any>} feeds @returns {Promise<Record<string, Tensor>>} */
  async run(graph, feeds) {
    this.runs.push(graph);
    const { name, data, dims } = this.compute(graph, feeds);
    return { [name]: { data, dims } };
  }

  /** @param {string} graph @param {Record<string, any>} feeds */
  compute(graph, feeds) {
    if (graph === "vae_encoder") return encoder(feeds.image);
    const alone = graph === "unet_conditional" ? 1 : 1.5; // the conditional branch, or guidance that is inside
    if (graph.startsWith("unet")) return unet(feeds.sample, feeds.timestep.data, feeds.guidance_scale?.data[0] ?? alone);
    if (graph === "vae_decoder_lower") return lower(feeds.latent);
    if (graph === "vae_decoder_upper") return upper(feeds.features, feeds.overview, feeds.inside);
    return decoder(feeds.latent, graph === "vae_decoder" ? 0.4 : 0.1);
  }
}

/** RGBA. @param {number} height @param {number} width @param {{alpha?: boolean, grey?: boolean}} [kind] */
export function pictureOf(height, width, { alpha = false, grey = false } = {}) {
  const data = new Uint8ClampedArray(height * width * 4);
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i += 4) {
      const chequered = ((x >> 4) ^ (y >> 4)) & 1;
      const base = Math.floor((x * 5) / 2) + Math.floor((y * 3) / 2) + ((x * y) >> 6) + 60 * chequered;
      for (let c = 0; c < 3; c++) data[i + c] = (base + (grey ? 0 : 40 * c)) & 255;
      const place = (x + 2 * y) % 17;
      data[i + 3] = !alpha ? 255 : place < 3 ? 0 : place === 4 ? 128 : 255;
    }
  }
  return { data, height, width, grey };
}

/** @param {number} height @param {number} width @param {number[][]} rects top, left, bottom, right @param {number} one */
export function maskOf(height, width, rects, one = 255) {
  const data = new Uint8Array(height * width);
  for (const [top, left, bottom, right] of rects) {
    for (let y = top; y < Math.min(bottom, height); y++) {
      data.fill(one, y * width + left, y * width + Math.min(right, width));
    }
  }
  return { data, height, width };
}
