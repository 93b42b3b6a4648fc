// The options of a run, checked, and the values that they give with the mode's and the bundle's defaults.
// As moebius_runtime.settings. It runs in Node too.

import { InputError } from "./errors.js";

/**
 * Options of a run; what is absent or null takes the mode's default, or the bundle's if the mode has none.
 * @typedef {object} Options
 * @property {string} [mode] `best`, `balanced`, `fast` or `reference`
 * @property {number} [steps]
 * @property {number} [guidance_scale] 0 to 100; 1 runs the conditional branch alone
 * @property {number} [strength] above 0 to 1
 * @property {string} [sampler]
 * @property {[number, number]} [guidance_interval] lowest and highest timestep with guidance, both included
 * @property {number} [seed] of the starting noise; square i of a picture takes seed + i
 * @property {string} [fit] `crop` or `whole`
 * @property {string} [blend] `soft` or `hard`
 * @property {string} [mask_reduce] `nearest` or `max`
 * @property {number | "auto"} [mask_dilate]
 * @property {string} [start] `pixels` or `cells`
 * @property {string} [decode] `full` or `masked`
 * @property {string} [vae_decoder] `full` or `tiny`
 * @property {boolean} [compensate_colour]
 * @property {number} [max_squares]
 */
/**
 * Defaults of a mode; null takes the bundle's.
 * @typedef {object} Mode
 * @property {number | null} steps
 * @property {number | null} strength
 * @property {string} sampler
 * @property {[number, number] | null} guidance_interval
 * @property {"crop" | "whole"} fit
 * @property {"soft" | "hard"} blend
 * @property {"nearest" | "max"} mask_reduce
 * @property {number | "auto"} mask_dilate
 * @property {"pixels" | "cells" | null} start
 * @property {"full" | "masked"} decode
 * @property {"full" | "tiny"} vae_decoder
 * @property {boolean} original follow the original's procedure, in which masked pixels influence the result
 */
/** @typedef {Mode & {steps: number, strength: number, guidance_scale: number}} Settings the values of a run */
/** @typedef {import("./graphs.js").Manifest} Manifest */

/** @type {Mode} */
const BEST = {
  steps: null,
  strength: 1,
  sampler: "ddim",
  guidance_interval: null,
  fit: "crop",
  blend: "soft",
  mask_reduce: "max",
  mask_dilate: "auto",
  start: "cells",
  decode: "full",
  vae_decoder: "full",
  original: false,
};

/** @type {Record<string, Mode>} A bundle's manifest may have its own values for every mode but `reference`. */
export const MODES = {
  reference: {
    ...BEST,
    strength: null,
    fit: "whole",
    mask_reduce: "nearest",
    mask_dilate: 0,
    start: null,
    original: true,
  },
  best: BEST,
  balanced: { ...BEST, steps: 10, decode: "masked" },
  fast: { ...BEST, steps: 3, sampler: "dpmpp-2m", guidance_interval: [100, 999], decode: "masked" },
};
export const DEFAULT_MODE = "best";

const CHOICES = {
  mode: Object.keys(MODES),
  sampler: ["ddim", "dpmpp-2m", "unipc", "lcm"],
  fit: ["crop", "whole"],
  blend: ["soft", "hard"],
  mask_reduce: ["nearest", "max"],
  start: ["pixels", "cells"],
  decode: ["full", "masked"],
  vae_decoder: ["full", "tiny"],
};
const MOST_SEED = 4294967295;

/** @type {Record<string, [(value: any) => boolean, string]>} for each other option: whether a value fits, and what would */
const RANGES = {
  steps: [(value) => Number.isInteger(value) && value >= 1, "a whole number, 1 or more"],
  guidance_scale: [(value) => typeof value === "number" && value >= 0 && value <= 100, "a number from 0 to 100"],
  strength: [(value) => typeof value === "number" && value > 0 && value <= 1, "a number above 0, at most 1"],
  guidance_interval: [isInterval, "the lowest and the highest timestep with guidance, such as 200, 800"],
  seed: [(value) => Number.isInteger(value) && value >= 0 && value <= MOST_SEED, `a whole number from 0 to ${MOST_SEED}`],
  mask_dilate: [
    (value) => value === "auto" || (Number.isInteger(value) && value >= 0),
    "auto or a whole number of pixels, 0 or more",
  ],
  compensate_colour: [(value) => typeof value === "boolean", "true or false"],
  max_squares: [(value) => Number.isInteger(value) && value >= 1, "a whole number, 1 or more"],
};

/** @param {any} value */
function isInterval(value) {
  const whole = Array.isArray(value) && value.length === 2 && value.every(Number.isInteger);
  return whole && value[0] >= 0 && value[0] <= value[1];
}

/**
 * The options that are given, each checked on its own.
 * @param {Record<string, any>} options
 * @returns {Options}
 * @throws {InputError} an option is unknown, or has a value that it cannot have
 */
export function checkedOptions(options) {
  const given = Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined && value !== null));
  for (const [name, value] of Object.entries(given)) {
    const choices = Object.hasOwn(CHOICES, name) ? /** @type {Record<string, string[]>} */ (CHOICES)[name] : null;
    const [fits, expected] = choices
      ? [choices.includes(value), `one of ${choices.join(", ")}`]
      : Object.hasOwn(RANGES, name)
        ? [RANGES[name][0](value), RANGES[name][1]]
        : [false, `no such option, but one of ${[...Object.keys(CHOICES), ...Object.keys(RANGES)].join(", ")}`];
    if (!fits) throw new InputError(`${name} ${typeof value === "number" ? value : JSON.stringify(value)}: expected ${expected}`);
  }
  if (given.start && MODES[given.mode ?? DEFAULT_MODE].original) {
    throw new InputError(`start ${given.start}: mode ${given.mode} starts from the picture itself; use mode best`);
  }
  return given;
}

/**
 * The values of a run.
 * @param {Options} options as `checkedOptions` gives them
 * @param {Manifest} manifest
 * @returns {Settings}
 * @throws {InputError} two options contradict each other, or the bundle's network cannot serve one
 */
export function settingsOf(options, manifest) {
  const name = options.mode ?? DEFAULT_MODE;
  const own = Object.entries(manifest.modes?.[name] ?? {}).filter(([, value]) => value !== null);
  const { guidance_scale, strength, num_inference_steps } = manifest.defaults;
  const mode = { ...MODES[name], ...Object.fromEntries(own) };
  /** @type {Settings} */
  const settings = {
    ...mode,
    ...Object.fromEntries(Object.entries(options).filter(([key]) => key in mode || key === "guidance_scale")),
    steps: options.steps ?? mode.steps ?? num_inference_steps,
    strength: options.strength ?? mode.strength ?? strength,
    guidance_scale: options.guidance_scale ?? guidance_scale,
  };
  if (!CHOICES.sampler.includes(settings.sampler)) {
    throw new InputError(
      `sampler ${settings.sampler}: the bundle's mode ${name} names it, and this version has only ` +
        `${CHOICES.sampler.join(", ")}; update the site, or name a sampler`,
    );
  }
  const lcm = [settings.sampler, manifest.defaults.sampler].includes("lcm");
  if (options.strength === undefined && mode.strength !== null && !lcm) {
    settings.strength = enough(settings.strength, settings.steps);
  }
  if (settings.vae_decoder === "tiny") {
    if (options.decode === "masked") {
      throw new InputError("decode masked: the tiny decoder always decodes the whole square; use vae_decoder full");
    }
    settings.decode = "full";
  }
  return distilled(settings, options, manifest);
}

/**
 * A mode's strength, raised to four decimals where it would keep none of so few steps.
 * @param {number} strength
 * @param {number} steps
 */
function enough(strength, steps) {
  return Math.trunc(steps * strength) >= 1 ? strength : Math.ceil(10000 / steps) / 10000;
}

/**
 * The values of a run on a bundle of a distilled network: one guidance scale, and perhaps one sampler for a few steps.
 * @param {Settings} settings
 * @param {Options} options
 * @param {Manifest} manifest
 * @returns {Settings}
 */
function distilled(settings, options, { defaults, guidance }) {
  const lcm = defaults.sampler === "lcm";
  if (lcm !== (settings.sampler === "lcm") && options.sampler !== undefined) {
    throw new InputError(
      lcm
        ? `sampler ${options.sampler}: this bundle's network was distilled for sampler lcm; leave the sampler out`
        : "sampler lcm: this bundle's network was not distilled for it; use ddim, dpmpp-2m or unipc",
    );
  }
  const steps = lcm && options.steps === undefined ? Math.min(settings.steps, defaults.num_inference_steps) : settings.steps;
  const values = { ...settings, sampler: lcm ? "lcm" : settings.sampler, steps };
  if (!guidance) return values;
  if (options.guidance_interval) {
    throw new InputError("guidance_interval: this bundle's network has its guidance inside, at every step; leave it out");
  }
  const scale = guidance.distilled;
  if (options.guidance_scale !== undefined && options.guidance_scale !== scale) {
    throw new InputError(
      `guidance_scale ${options.guidance_scale}: this bundle's network was distilled at ${scale} and has no other; ` +
        "leave it out",
    );
  }
  return { ...values, guidance_scale: scale, guidance_interval: null };
}
