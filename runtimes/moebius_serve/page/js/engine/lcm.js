// The sampler of latent consistency models, as moebius_runtime.sampling.lcm: Luo et al. 2023, algorithm 3.

import { noiseStream } from "./random.js";
import { cleanLatents, walk } from "./samplers.js";

const f32 = Math.fround;

const GRID = 50; // timesteps of the distillation, evenly spaced
const SIGMA_DATA = 0.5;
const TIMESTEP_SCALING = 10;

/** @typedef {import("./schedule.js").NoiseSchedule} NoiseSchedule */

/**
 * The timesteps to evaluate, falling, evenly chosen from the distillation's grid. `strength` shortens the grid.
 * @param {NoiseSchedule} schedule
 * @param {number} steps
 * @param {number} strength above 0, at most 1
 * @returns {number[]}
 */
export function lcmTimesteps(schedule, steps, strength) {
  const kept = Math.trunc(GRID * strength);
  if (schedule.count < GRID || !Number.isInteger(steps) || steps < 1 || steps > kept) {
    throw new RangeError(
      `${steps} steps with sampler lcm at strength ${strength}; expected 1 to ${kept}, the timesteps that the network was ` +
        "distilled at",
    );
  }
  const stride = Math.floor(schedule.count / GRID);
  return Array.from({ length: steps }, (_, i) => (kept - Math.floor(i * (kept / steps))) * stride - 1);
}

/**
 * c_skip and c_out of a timestep, for f = c_skip * noisy + c_out * clean (Luo et al. 2023, section 4.1).
 * @param {number} timestep
 * @returns {[number, number]}
 */
function boundary(timestep) {
  const [scaled, data] = [timestep * TIMESTEP_SCALING, SIGMA_DATA ** 2];
  const below = scaled ** 2 + data;
  return [data / below, scaled / Math.sqrt(below)];
}

/**
 * The sampler, with its noise: clean latents at every step, then noise of the next timestep.
 * @param {number} seed of the starting noise too, which comes first in its stream
 * @param {[number, number, number, number]} shape
 * @param {number} offset see `noiseStream`
 * @returns {import("./samplers.js").Sampler}
 */
export function lcmSampler(seed, shape, offset) {
  return async (denoise, latents, schedule, timesteps, onStep) => {
    const noises = noiseStream(seed, shape, offset);
    noises.next();
    return walk(denoise, latents, schedule, timesteps, onStep, (step, x, noise) => {
      const clean = cleanLatents(schedule, x, noise, timesteps[step]);
      const [skip, out] = boundary(timesteps[step]).map(f32);
      const reached = x.map((value, i) => f32(skip * value) + f32(out * clean[i]));
      const next = timesteps[step + 1];
      return next === undefined ? reached : schedule.addNoise(reached, noises.next().value, next);
    });
  };
}
