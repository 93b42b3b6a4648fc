// The samplers of moebius_runtime.sampling.samplers, with the same roundings: coefficients in float64, arrays in float32.
// The sources of the equations are named there. It runs in Node too.

const f32 = Math.fround;

/** @typedef {import("./schedule.js").NoiseSchedule} NoiseSchedule */
/** @typedef {(latents: Float32Array, timestep: number) => Promise<Float32Array>} Denoise what the network predicts */
/** @typedef {(step: number, timestep: number, latents: Float32Array) => void} OnStep */
/** @typedef {{signal: number, noise: number, logRatio: number}} Level latents = signal * clean + noise * N(0, 1) */
/** @typedef {(step: number, x: Float32Array, noise: Float32Array) => Float32Array} Advance */
/**
 * @typedef {(denoise: Denoise, latents: Float32Array, schedule: NoiseSchedule, timesteps: number[], onStep?: OnStep) =>
 *   Promise<Float32Array>} Sampler clean latents from noisy ones at timesteps[0]
 */

/** @type {Sampler} DDIM without added noise: Song et al. 2021a, equation 12. */
export async function ddim(denoise, latents, schedule, timesteps, onStep) {
  const levels = levelsOf(schedule, timesteps);
  return walk(denoise, latents, schedule, timesteps, onStep, (step, x, noise) => {
    const target = levels[step + 1];
    const [signal, level] = [f32(target.signal), f32(target.noise)];
    return clean(x, noise, levels[step]).map((value, i) => f32(signal * value) + f32(level * noise[i]));
  });
}

/** @type {Sampler} DPM-Solver++(2M): Lu et al. 2022b, algorithm 2. */
export async function dpmpp2m(denoise, latents, schedule, timesteps, onStep) {
  const levels = levelsOf(schedule, timesteps);
  /** @type {Float32Array[]} */
  let past = [];
  return walk(denoise, latents, schedule, timesteps, onStep, (step, x, noise) => {
    past = [...past, clean(x, noise, levels[step])].slice(-2);
    return extrapolated(x, past, levels, step);
  });
}

/** @type {Sampler} UniPC-2 with B2(h): Zhao et al. 2023, algorithms 1 and 2. */
export async function unipc(denoise, latents, schedule, timesteps, onStep) {
  const levels = levelsOf(schedule, timesteps);
  /** @type {Float32Array[]} */
  let past = [];
  let origin = latents;
  return walk(denoise, latents, schedule, timesteps, onStep, (step, x, noise) => {
    past = [...past, clean(x, noise, levels[step])].slice(-3);
    origin = step ? corrected(origin, past, levels, step) : x;
    return extrapolated(origin, past, levels, step);
  });
}

/** @type {Record<string, {sample: Sampler, spacing: import("./schedule.js").Spacing}>} */
export const SAMPLERS = {
  ddim: { sample: ddim, spacing: "leading" },
  "dpmpp-2m": { sample: dpmpp2m, spacing: "logsnr" },
  unipc: { sample: unipc, spacing: "logsnr" },
};

/**
 * The levels of the timesteps, then that of clean data.
 * @param {NoiseSchedule} schedule
 * @param {number[]} timesteps
 * @returns {Level[]}
 */
function levelsOf(schedule, timesteps) {
  const falling = timesteps.every((t, i) => Number.isInteger(t) && t >= 0 && t < (i ? timesteps[i - 1] : schedule.count));
  if (!timesteps.length || !falling) {
    throw new RangeError(`timesteps are ${timesteps}; expected falling whole numbers below ${schedule.count}`);
  }
  const levels = timesteps.map((timestep) => {
    const bar = schedule.alphasCumprod[timestep];
    return { signal: Math.sqrt(bar), noise: Math.sqrt(1 - bar), logRatio: 0.5 * Math.log(bar / (1 - bar)) };
  });
  return [...levels, { signal: 1, noise: 0, logRatio: Infinity }];
}

/**
 * Evaluates, advances, checks and reports, once per timestep.
 * @param {Denoise} denoise
 * @param {Float32Array} latents
 * @param {NoiseSchedule} schedule
 * @param {number[]} timesteps
 * @param {OnStep | undefined} onStep
 * @param {Advance} advance
 */
export async function walk(denoise, latents, schedule, timesteps, onStep, advance) {
  let x = latents;
  for (const [step, timestep] of timesteps.entries()) {
    const predicted = await denoise(x, timestep);
    if (predicted.length !== x.length) {
      throw new Error(`step ${step}: the network gave ${predicted.length} values, expected ${x.length}`);
    }
    x = advance(step, x, schedule.predictedNoise(predicted, x, timestep));
    if (!x.every(Number.isFinite)) throw new Error(`step ${step} (timestep ${timestep}): the latents are not finite`);
    onStep?.(step, timestep, x);
  }
  return x;
}

/**
 * The clean latents that `x` at a timestep and its predicted noise imply.
 * @param {NoiseSchedule} schedule
 * @param {Float32Array} x
 * @param {Float32Array} noise
 * @param {number} timestep
 */
export function cleanLatents(schedule, x, noise, timestep) {
  return clean(x, noise, levelsOf(schedule, [timestep])[0]);
}

/**
 * The clean latents that `x` and its predicted noise imply (Song et al. 2021a, equation 9).
 * @param {Float32Array} x
 * @param {Float32Array} noise
 * @param {Level} level
 */
function clean(x, noise, level) {
  const [signal, share] = [f32(level.signal), f32(level.noise)];
  return x.map((value, i) => f32(value - f32(share * noise[i])) / signal);
}

/**
 * From `x` at levels[step] to the next level; see `_extrapolate` of the Python module.
 * @param {Float32Array} x
 * @param {Float32Array[]} past clean-data predictions, newest last
 * @param {Level[]} levels
 * @param {number} step
 */
function extrapolated(x, past, levels, step) {
  let data = past[past.length - 1];
  if (step > 0 && step < levels.length - 2) {
    const [before, here, target] = levels.slice(step - 1, step + 2);
    const ratio = (here.logRatio - before.logRatio) / (target.logRatio - here.logRatio);
    const [weight, newest, older] = [f32(0.5 / ratio), data, past[past.length - 2]];
    data = newest.map((value, i) => value + f32(weight * f32(value - older[i])));
  }
  return moved(x, data, levels[step], levels[step + 1]);
}

/**
 * Redoes the step from `x` at levels[step - 1], now that the newest prediction was made at its end; see `_correct`.
 * @param {Float32Array} x
 * @param {Float32Array[]} past
 * @param {Level[]} levels
 * @param {number} step 1 or later
 */
function corrected(x, past, levels, step) {
  const [origin, target] = [levels[step - 1], levels[step]];
  const [middle, newest] = past.slice(-2);
  if (step === 1) {
    return moved(x, middle.map((value, i) => value + f32(0.5 * f32(newest[i] - value))), origin, target);
  }
  const oldest = past[past.length - 3];
  const h = target.logRatio - origin.logRatio;
  const ratio = (levels[step - 2].logRatio - origin.logRatio) / h;
  const growth = Math.expm1(-h);
  const moment = -growth / h - 1;
  const b1 = moment / growth;
  const b2 = (-2 * (moment / h + 0.5)) / growth;
  const ofOld = (b1 - b2) / (1 - ratio);
  const [older, newer] = [f32(ofOld / ratio), f32(b1 - ofOld)];
  const data = middle.map((value, i) => {
    const first = f32(value + f32(older * f32(oldest[i] - value)));
    return first + f32(newer * f32(newest[i] - value));
  });
  return moved(x, data, origin, target);
}

/**
 * The exact solution from `origin` to `target` if the clean data were `data` all the way.
 * @param {Float32Array} x
 * @param {Float32Array} data
 * @param {Level} origin
 * @param {Level} target
 */
function moved(x, data, origin, target) {
  const growth = Math.expm1(origin.logRatio - target.logRatio);
  const [ofX, ofData] = [f32(target.noise / origin.noise), f32(target.signal * growth)];
  return x.map((value, i) => f32(ofX * value) - f32(ofData * data[i]));
}
