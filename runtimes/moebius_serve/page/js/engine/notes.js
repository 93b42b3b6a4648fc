// Notes for the person on settings and masks that are probably not what they want. They change no pixel.
// As moebius_runtime.settings.options and moebius_runtime.regions.mask_notes. It runs in Node too.

const LITTLE_NOISE = 0.25; // of 1: with less, the start decides the result
const MOST = 0.75; // share of the picture above which a mask is usually inverted

/** @typedef {import("./settings.js").Settings} Settings */

/**
 * Notes on settings with side effects.
 * @param {Settings} settings
 * @param {number[]} timesteps
 * @param {import("./schedule.js").NoiseSchedule} schedule
 * @param {number} recommended steps of a bundle for sampler lcm
 * @returns {string[]}
 */
export function optionNotes({ original, sampler, steps, strength }, timesteps, schedule, recommended) {
  const first = timesteps[0];
  const notes = [];
  if (original && strength < 1) {
    notes.push(
      `mode reference at strength ${strength} starts from the picture with what is to be removed in it (at timestep ` +
        `${first}), which may show through; mode best does not`,
    );
  } else if (!original && 1 - Math.sqrt(schedule.alphasCumprod[first]) < LITTLE_NOISE) {
    notes.push(
      `the ${timesteps.length} steps start at timestep ${first}, where little noise is left: the masked region stays ` +
        "close to a smooth gradient; more steps or strength 1 give it detail",
    );
  }
  if (sampler === "lcm" && steps > recommended) {
    notes.push(`${steps} steps: this bundle was distilled for ${recommended}, more take longer and may not look better`);
  }
  return notes;
}

/**
 * Notes on a mask that marks most of the picture, or transparent pixels.
 * @param {{data: Uint8ClampedArray}} picture RGBA
 * @param {Uint8Array} mask 0 and 1, as given
 * @returns {string[]}
 */
export function maskNotes({ data }, mask) {
  let [marked, transparent] = [0, 0];
  mask.forEach((value, i) => {
    marked += value;
    if (value && data[i * 4 + 3] < 255) transparent++;
  });
  const notes = [];
  if (marked / mask.length > MOST) {
    notes.push(`the mask marks ${percent(marked / mask.length)} of the picture; if it marks what to keep, invert it`);
  }
  if (transparent) {
    notes.push(
      `${percent(transparent / marked)} of the masked pixels are transparent or partly transparent and stay so: colours ` +
        "are replaced, alpha is kept",
    );
  }
  return notes;
}

/** @param {number} share */
function percent(share) {
  return `${Math.round(share * 100)}%`;
}
