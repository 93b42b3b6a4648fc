// Fills the mask of a picture with the graphs of a bundle, as moebius_runtime.pipeline: squares that do not overlap go
// through one graph after the other. It runs in a page, in a worker and in Node.

import { decoded, decodedWindowOf } from "./decoding.js";
import { windowOf, wholeCrop } from "./crop.js";
import { InputError } from "./errors.js";
import { branchOf, decodersOf, FULL, MASKED, runner } from "./graphs.js";
import { lcmSampler, lcmTimesteps } from "./lcm.js";
import { grownMask, markedPixels, reducedMask } from "./masks.js";
import { seen, smoothCells, unknownOf } from "./network_input.js";
import { maskNotes, optionNotes } from "./notes.js";
import { pasted, pastedBox } from "./paste.js";
import { initialNoise } from "./random.js";
import { SAMPLERS } from "./samplers.js";
import { NoiseSchedule } from "./schedule.js";
import { checkedOptions, settingsOf } from "./settings.js";
import { apart, wholeSquare } from "./square.js";
import { findSquares } from "./squares.js";

/** @typedef {import("./cells.js").Grid} Grid */
/** @typedef {import("./graphs.js").Manifest} Manifest */
/** @typedef {import("./graphs.js").Run} Run */
/** @typedef {import("./graphs.js").Sessions} Sessions */
/** @typedef {import("./settings.js").Options} Options */
/** @typedef {import("./settings.js").Settings} Settings */
/** @typedef {import("./square.js").Square} Square */
/**
 * RGBA, not premultiplied, row by row. `grey`: the file has one channel, so the filling is grey too.
 * @typedef {{data: Uint8ClampedArray, width: number, height: number, grey?: boolean}} Picture
 */
/** @typedef {Picture & {notes: string[]}} Filled the filled picture, and notes for the person */
/**
 * Steps done and to do, over all squares. `picture`, after each run of squares, is the picture with what is filled so
 * far: the engine goes on writing to it, so copy what is kept.
 * @typedef {{done: number, total: number, picture: Picture | null}} Progress
 */
/**
 * One square between the graphs.
 * @typedef {object} Work
 * @property {Square} square
 * @property {number} number in the order of the plan
 * @property {Float32Array} latents the noise, then what the steps start from, then the finished latents; [1, C, s, s]
 * @property {Float32Array} condition [1 + C, s, s]
 * @property {import("./resize.js").Rgb | null} generated [S, S]
 * @property {string | null} note
 */
/**
 * What a run reads everywhere.
 * @typedef {object} Context
 * @property {Manifest} manifest
 * @property {Options} options
 * @property {Settings} settings
 * @property {NoiseSchedule} schedule
 * @property {number[]} timesteps
 * @property {{graph: string, scaleAt: (timestep: number) => number}} branch of the U-Net
 * @property {string[]} decoders
 * @property {Run} run
 */

/**
 * Fills the mask of a picture.
 * @param {Sessions} sessions runs the graphs; all squares of a run go through a graph before the next graph is run
 * @param {Manifest} manifest of the bundle
 * @param {Picture} image unchanged
 * @param {{data: Uint8Array, width: number, height: number}} mask one byte a pixel; 128 and more is filled
 * @param {Record<string, unknown>} [options] see `Options`; what is absent takes the mode's or the bundle's default
 * @param {(progress: Progress) => void} [onProgress] called before the first step, after every step and every run of squares
 * @param {AbortSignal} [signal] ends the work before the next run of a graph
 * @returns {Promise<Filled>}
 * @throws {InputError} the picture, the mask or an option cannot be served
 * @throws {import("./errors.js").OutputError} a graph's result is not as the manifest describes, or no picture
 * @throws the signal's reason, an `AbortError`, where it was aborted
 */
export async function inpaint(sessions, manifest, image, mask, options = {}, onProgress = () => {}, signal) {
  const given = checkedOptions(options);
  const settings = settingsOf(given, manifest);
  const schedule = new NoiseSchedule(manifest.schedule);
  const timesteps = timestepsOf(schedule, settings);
  const { graphs: decoders, note } = decodersOf(manifest, settings, given);
  const branch = branchOf(manifest, settings, timesteps);
  const run = runner(sessions, manifest, signal);
  const context = { manifest, options: given, settings, schedule, timesteps, branch, decoders, run };
  const picture = copyOf(image);
  const marked = markedPixels(mask, picture);
  const unknown = fillable(picture, marked, settings); // what no square has filled yet
  const notes = maskNotes(picture, marked, unknown);
  notes.push(...optionNotes(settings, timesteps, schedule, manifest.defaults.num_inference_steps), ...(note ? [note] : []));
  const squares = squaresOf(unknown, manifest.geometry.image_size, settings.fit, given.max_squares ?? 64);
  const total = squares.length * timesteps.length;
  let done = 0;
  onProgress({ done, total, picture: null });
  let first = 0;
  for (const several of apart(squares, picture)) {
    const works = several.map((square, index) => workOf(square, first + index, context));
    for (const work of works) await encode(work, picture, unknown, context);
    for (const work of works) {
      await denoise(work, context, () => onProgress({ done: ++done, total, picture: null }));
    }
    for (const work of works) work.generated = await decode(work, unknown, context);
    for (const { square, number, generated, note: about } of works) {
      if (about) notes.push(squares.length === 1 ? about : `square ${number + 1}: ${about}`);
      const colour = { compensate: given.compensate_colour ?? false, grey: picture.grey ?? false };
      if (generated) pasted(generated, square, picture, unknown, settings, colour);
    }
    first += works.length;
    onProgress({ done, total, picture });
  }
  return { ...picture, notes };
}

/** @param {Picture} image @returns {Picture} */
function copyOf({ data, width, height, grey = false }) {
  if (data.length !== width * height * 4) {
    throw new InputError(`the picture is ${width}x${height} with ${data.length} bytes; expected 4 bytes a pixel (RGBA)`);
  }
  return { data: data.slice(), width, height, grey };
}

/**
 * The pixels to fill: the marked ones, grown as the settings say.
 * @param {Picture} picture
 * @param {Grid} marked
 * @param {Settings} settings
 * @returns {Grid} new
 */
function fillable(picture, marked, settings) {
  const grown = grownMask(marked, settings.mask_dilate);
  const visible = grown.data.some((marked, i) => !marked && picture.data[i * 4 + 3] > 0);
  if (!visible && !settings.original) {
    throw new InputError(
      "the mask marks every visible pixel of the picture, which leaves nothing to fill from; the rest is transparent. " +
        "Mark less of it, or give the picture without its transparency",
    );
  }
  return { ...grown, data: grown.data.slice() };
}

/** @param {NoiseSchedule} schedule @param {Settings} settings */
function timestepsOf(schedule, { sampler, steps, strength }) {
  try {
    if (sampler === "lcm") return lcmTimesteps(schedule, steps, strength);
    return schedule.inferenceTimesteps(steps, strength, SAMPLERS[sampler].spacing);
  } catch (error) {
    throw error instanceof RangeError ? new InputError(error.message) : error;
  }
}

/**
 * The squares of a mask, in the order to fill them in.
 * @param {Grid} mask
 * @param {number} size the network's side
 * @param {"crop" | "whole"} fit
 * @param {number} limit
 */
function squaresOf(mask, size, fit, limit) {
  return fit === "whole" ? [wholeSquare(wholeCrop(mask, size), mask)] : findSquares(mask, size, limit);
}

/** @param {Square} square @param {number} number @param {Context} context @returns {Work} */
function workOf(square, number, { manifest: { geometry, defaults }, options }) {
  const { latent_channels: channels, latent_size: side } = geometry;
  const latents = initialNoise(seedOf(options, number), [1, channels, side, side], defaults.noise_offset);
  return { square, number, latents, condition: new Float32Array(0), generated: null, note: null };
}

/** @param {Options} options @param {number} number of the square */
function seedOf({ seed = 0 }, number) {
  return (seed + number) % 2 ** 32;
}

/**
 * Brings a square to the network's size, encodes it, and adds the noise that the steps start from.
 * @param {Work} work
 * @param {Picture} picture
 * @param {Grid} mask what is unknown of it
 * @param {Context} context
 */
async function encode(work, picture, mask, { manifest: { geometry }, settings, schedule, timesteps, run }) {
  const { image_size: size, latent_size: side, latent_channels: channels } = geometry;
  const unknown = unknownOf(picture, mask, windowOf(work.square.crop, picture), settings.original);
  const { image, masked } = seen(picture, unknown, work.square.crop, size, settings.original);
  const { cells, note } = reducedMask(masked, side, settings.mask_reduce);
  work.note = masked.data.includes(0) ? note : "all pixels around it are masked or transparent, so it has no context";
  const dims = [1, 3, size, size];
  const area = size * size;
  const shown = image.map((value, i) => (masked.data[i % area] ? 0 : value));
  const maskedLatents = await run("vae_encoder", { image: { data: shown, dims } });
  if (!(settings.original && settings.strength === 1)) {
    // Otherwise the original starts from pure noise.
    const start =
      settings.start === "cells"
        ? smoothCells(maskedLatents, masked, side)
        : await run("vae_encoder", { image: { data: image, dims } });
    work.latents = schedule.addNoise(start, work.latents, timesteps[0]);
  }
  work.condition = new Float32Array((1 + channels) * side * side);
  work.condition.set(cells);
  work.condition.set(maskedLatents, side * side);
}

/**
 * @param {Work} work
 * @param {Context} context
 * @param {() => void} onStep
 */
async function denoise(work, { manifest, options, settings, schedule, timesteps, branch, run }, onStep) {
  const { latent_channels: channels, latent_size: side } = manifest.geometry;
  const sample =
    settings.sampler === "lcm"
      ? lcmSampler(seedOf(options, work.number), [1, channels, side, side], manifest.defaults.noise_offset)
      : SAMPLERS[settings.sampler].sample;
  work.latents = await sample(
    async (latents, timestep) => {
      const data = new Float32Array((2 * channels + 1) * side * side);
      data.set(latents);
      data.set(work.condition, latents.length);
      return run(branch.graph, {
        sample: { data, dims: [1, 2 * channels + 1, side, side] },
        timestep: { data: [timestep], dims: [1] },
        guidance_scale: { data: [branch.scaleAt(timestep)], dims: [1] },
      });
    },
    work.latents,
    schedule,
    timesteps,
    onStep,
  );
}

/** The generated square, or of it what is pasted. @param {Work} work @param {Grid} unknown @param {Context} context */
async function decode(work, unknown, { manifest, options, settings, decoders, run }) {
  let window = null;
  if (decoders === MASKED) {
    const size = manifest.geometry.image_size;
    const box = pastedBox(work.square, unknown, size, settings, options.compensate_colour ?? false);
    window = decodedWindowOf(box, manifest);
  }
  return decoded(run, decoders === MASKED ? FULL[0] : decoders[0], work.latents, window, manifest);
}
