// Notes for the person on settings and masks that are probably not what they want. They change no pixel.
// As moebius_runtime.settings.options and moebius_runtime.regions.mask_notes. It runs in Node too.

import { boundingBox } from "./cells.js";

const LITTLE_NOISE = 0.25; // of 1: with less, the start decides the result
const MOST = 0.75; // share of the picture above which a mask is usually inverted
const STRONG = 24; // grey levels between adjacent pixels
const AMONG_PLAIN = 3; // times the median difference a few pixels outside
const SHARE = 0.25; // of the mask's border
const BESIDE = 4; // pixels outside the border where the picture's own texture is measured
const MOST_PAIRS = 200_000;

/** @typedef {import("./cells.js").Grid} Grid */
/** @typedef {{data: Uint8ClampedArray, width: number, height: number, grey?: boolean}} Picture RGBA */
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
 * Notes on a mask that marks most of the picture, runs along an edge of it, or marks transparent pixels.
 * @param {Picture} picture
 * @param {Grid} mask 0 and 1, as given
 * @param {Grid} grown what is filled
 * @returns {string[]}
 */
export function maskNotes(picture, { data: mask }, grown) {
  let [marked, transparent] = [0, 0];
  mask.forEach((value, i) => {
    marked += value;
    if (value && picture.data[i * 4 + 3] < 255) transparent++;
  });
  const notes = [];
  if (marked / mask.length > MOST) {
    notes.push(`the mask marks ${percent(marked / mask.length)} of the picture; if it marks what to keep, invert it`);
  }
  const strong = edgeShare(picture, grown);
  if (strong) {
    notes.push(
      `an edge of the picture runs along ${percent(strong)} of the mask's border, so what is removed may leave its ` +
        "outline; mark it more widely, or grow the mask by more pixels",
    );
  }
  if (transparent) {
    notes.push(
      `${percent(transparent / marked)} of the masked pixels are transparent or partly transparent and stay so: colours ` +
        "are replaced, alpha is kept",
    );
  }
  return notes;
}

/**
 * Share of the mask's border that lies on a strong edge of the picture; 0 where it is under a quarter.
 *
 * A pair of adjacent pixels across the border is on an edge where its luma differs by more than 24 levels, and by more
 * than three times the median difference of such pairs a few pixels outside: texture on both sides is no edge.
 * @param {Picture} picture
 * @param {Grid} mask 0 and 1, with a 1
 */
export function edgeShare(picture, mask) {
  const box = boundingBox(mask);
  if (!box) return 0;
  const [top, left] = [Math.max(0, box.top - BESIDE - 3), Math.max(0, box.left - BESIDE - 3)];
  const bottom = Math.min(mask.height, box.bottom + BESIDE + 3);
  const right = Math.min(mask.width, box.right + BESIDE + 3);
  const down = { begin: top, end: bottom, stride: mask.width, others: [left, right], step: 1 };
  const over = { begin: left, end: right, stride: 1, others: [top, bottom], step: mask.width };
  /** @type {number[]} */
  const across = [];
  /** @type {number[]} */
  const beside = [];
  for (const way of [down, over]) differences(picture, mask.data, way, across, beside);
  if (!across.length) return 0;
  const least = Math.max(STRONG, AMONG_PLAIN * median(beside));
  const share = across.filter((difference) => difference > least).length / across.length;
  return share >= SHARE ? share : 0;
}

/**
 * Adds the differences of luma across the mask's border, and a few pixels outside of it, in one direction.
 * @param {Picture} picture
 * @param {Uint8Array} mask
 * @param {{begin: number, end: number, stride: number, others: number[], step: number}} way lines of pixels from `begin`
 *   to before `end`, `stride` apart in memory; one line for each place in `others`, `step` apart
 * @param {number[]} across
 * @param {number[]} beside
 */
function differences(picture, mask, { begin, end, stride, others: [from, to], step }, across, beside) {
  const pairs = []; // the first pixel of each
  for (let place = begin; place + 1 < end; place++) {
    for (let line = from; line < to; line++) {
      const at = place * stride + line * step;
      if (mask[at] !== mask[at + stride]) pairs.push(at);
    }
  }
  const every = pairs.length > MOST_PAIRS ? (pairs.length - 1) / (MOST_PAIRS - 1) : 1;
  const count = Math.min(pairs.length, MOST_PAIRS);
  for (let i = 0; i < count; i++) {
    const at = pairs[Math.floor(i * every)];
    const place = stride === 1 ? at % step : Math.floor(at / stride);
    across.push(Math.abs(luma(picture, at) - luma(picture, at + stride)));
    const outward = mask[at] ? 1 : -1; // the masked one comes first, or last
    const outer = outward > 0 ? 1 : 0;
    const further = place + outer + outward * BESIDE;
    if (further < begin + 1 || further >= end - 1) continue;
    const there = at + (further - place) * stride;
    if (!mask[there]) beside.push(Math.abs(luma(picture, there) - luma(picture, there - outward * stride)));
  }
}

/** 0 to 255; invisible pixels are black. @param {Picture} picture @param {number} at */
function luma({ data, grey }, at) {
  const [red, green, blue, alpha] = data.subarray(at * 4, at * 4 + 4);
  return alpha === 0 ? 0 : grey ? red : 0.299 * red + 0.587 * green + 0.114 * blue;
}

/** 0 of none. @param {number[]} values */
function median(values) {
  if (!values.length) return 0;
  const sorted = Float64Array.from(values).sort();
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** @param {number} share */
function percent(share) {
  return `${Math.round(share * 100)}%`;
}
