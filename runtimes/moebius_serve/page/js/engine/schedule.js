// The noise schedule, as moebius_runtime.sampling.schedule has it, with the same roundings. It runs in Node too.

const f32 = Math.fround;

/** @typedef {"leading" | "logsnr"} Spacing */
/**
 * The field `schedule` of a manifest.
 * @typedef {{num_train_timesteps: number, beta_start: number, beta_end: number, beta_schedule: string,
 *   prediction_type: string}} ScheduleInfo
 */

export class NoiseSchedule {
  /** @param {ScheduleInfo} info */
  constructor(info) {
    if (info.beta_schedule !== "scaled_linear" || !["epsilon", "v_prediction"].includes(info.prediction_type)) {
      throw new RangeError(`schedule ${info.beta_schedule}, ${info.prediction_type}: not known to this version`);
    }
    this.count = info.num_train_timesteps;
    this.velocity = info.prediction_type === "v_prediction";
    /** Share of the signal at each timestep, falling. */
    this.alphasCumprod = alphasCumprod(info.beta_start, info.beta_end, this.count);
  }

  /**
   * The timesteps to evaluate, falling.
   * @param {number} steps 1 to the number of training timesteps
   * @param {number} strength above 0, at most 1: the share of the steps that is kept, from the end
   * @param {Spacing} spacing
   * @returns {number[]}
   */
  inferenceTimesteps(steps, strength = 1, spacing = "leading") {
    const kept = Math.min(Math.trunc(steps * strength), steps);
    if (!Number.isInteger(steps) || steps < 1 || steps > this.count || !(strength > 0 && strength <= 1) || kept < 1) {
      throw new RangeError(`${steps} steps at strength ${strength}: expected 1 to ${this.count} steps, of which one is kept`);
    }
    const stride = Math.floor(this.count / steps);
    const every =
      spacing === "leading" ? Array.from({ length: steps }, (_, i) => (steps - 1 - i) * stride) : this._evenLogSnr(steps);
    return every.slice(steps - kept);
  }

  /**
   * The noise in `latents` according to what the network predicted from them.
   * @param {Float32Array} predicted noise, or velocity (Salimans and Ho 2022, appendix D)
   * @param {Float32Array} latents
   * @param {number} timestep
   * @returns {Float32Array}
   */
  predictedNoise(predicted, latents, timestep) {
    if (!this.velocity) return predicted;
    return this._mixed(predicted, latents, timestep);
  }

  /**
   * Latents at `timestep` of the forward process (Ho et al. 2020, equation 4).
   * @param {Float32Array} latents clean
   * @param {Float32Array} noise
   * @param {number} timestep
   * @returns {Float32Array}
   */
  addNoise(latents, noise, timestep) {
    return this._mixed(latents, noise, timestep);
  }

  /**
   * sqrt(a) first + sqrt(1 - a) second, each operation rounded to float32.
   * @param {Float32Array} first
   * @param {Float32Array} second
   * @param {number} timestep
   */
  _mixed(first, second, timestep) {
    const bar = this.alphasCumprod[timestep];
    const a = f32(Math.sqrt(bar));
    const b = f32(Math.sqrt(1 - bar));
    return first.map((value, i) => f32(a * value) + f32(b * second[i]));
  }

  /**
   * The start of each of `steps` equal steps in half log-SNR, strictly falling.
   * @param {number} steps
   * @returns {number[]}
   */
  _evenLogSnr(steps) {
    const last = this.count - 1;
    const rising = Array.from({ length: this.count }, (_, i) => {
      const bar = this.alphasCumprod[last - i];
      return 0.5 * Math.log(bar / (1 - bar));
    });
    const stride = (rising[last] - rising[0]) / steps;
    const timesteps = [];
    for (let i = 0; i < steps; i++) {
      const wanted = i * stride + rising[0];
      let right = rising.findIndex((value) => value >= wanted);
      right = Math.min(Math.max(right, 1), last);
      const nearest = wanted - rising[right - 1] < rising[right] - wanted ? right - 1 : right;
      timesteps.push(last - nearest);
    }
    // Near timestep 0 the steps are shorter than a timestep: there each takes the next free one.
    let least = -Infinity;
    for (let i = steps - 1; i >= 0; i--) {
      const rank = steps - 1 - i;
      least = Math.max(least, timesteps[i] - rank);
      timesteps[i] = least + rank;
    }
    return timesteps;
  }
}

/**
 * The cumulative products of 1 - beta in float32, rounded as torch rounds them.
 * @param {number} start
 * @param {number} end
 * @param {number} count
 * @returns {Float32Array}
 */
function alphasCumprod(start, end, count) {
  const first = f32(Math.sqrt(start));
  const last = f32(Math.sqrt(end));
  const step = f32(f32(last - first) / f32(count - 1));
  const bars = new Float32Array(count);
  let product = 1;
  for (let i = 0; i < count; i++) {
    const root = f32(i < Math.floor(count / 2) ? first + step * i : last - step * (count - 1 - i));
    product *= f32(1 - f32(root * root));
    bars[i] = product;
  }
  return bars;
}
