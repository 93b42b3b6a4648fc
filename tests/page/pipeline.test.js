// The engine against what moebius_runtime computes: tests/golden/page_pictures.json (scripts/page_pictures_golden.py).

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { inflateSync } from "node:zlib";

import { outwardFeather } from "../../runtimes/moebius_serve/page/js/engine/blend.js";
import { gaussianBlurred } from "../../runtimes/moebius_serve/page/js/engine/blur.js";
import { edgeShare } from "../../runtimes/moebius_serve/page/js/engine/notes.js";
import { inpaint } from "../../runtimes/moebius_serve/page/js/engine/pipeline.js";
import { resizedRgb } from "../../runtimes/moebius_serve/page/js/engine/resize.js";
import { filledPixels } from "../../runtimes/moebius_serve/page/js/engine/smooth_fill.js";
import { findSquares } from "../../runtimes/moebius_serve/page/js/engine/squares.js";
import { maskOf, pictureOf, SimpleSessions } from "./pictures.js";

const golden = JSON.parse(readFileSync(new URL("../golden/page_pictures.json", import.meta.url), "utf8"));

/** @param {Uint8Array} data */
function hash(data) {
  return createHash("sha256").update(data).digest("hex").slice(0, 16);
}

/** @param {number} height @param {number} width */
function rgbOf(height, width) {
  const { data } = pictureOf(height, width);
  return { data: Uint8Array.from(data.filter((_, i) => i % 4 < 3)), height, width };
}

for (const [name, plan] of Object.entries(golden.plans)) {
  test(`squares: ${name}`, () => {
    const [height, width] = plan.shape;
    const found = findSquares(maskOf(height, width, plan.rects, 1), plan.size, plan.limit);
    const rows = found.map(({ crop, cell, top, left, cells }) => {
      return [crop.left, crop.top, crop.side, cell, top, left, hash(cells.data), cells.height, cells.width];
    });
    assert.deepEqual(rows, plan.squares);
  });
}

for (const { shape, size, box, sha256 } of golden.resizes) {
  test(`Lanczos: ${shape} to ${size}, box ${box}`, () => {
    assert.equal(hash(resizedRgb(rgbOf(shape[0], shape[1]), size[0], size[1], box).data), sha256);
  });
}

test("smooth values under a mask, and the feathers, are the runtime's to the bit", () => {
  const { shape, rects, filled_sha256, feathers, outward } = golden.masked;
  const mask = maskOf(shape[0], shape[1], rects, 1);
  assert.equal(hash(filledPixels(rgbOf(shape[0], shape[1]), mask).data), filled_sha256);
  for (const [width, sha256] of Object.entries(outward)) {
    assert.equal(hash(outwardFeather(mask, Number(width)).data), sha256, `outward, ${width}`);
  }
  const white = maskOf(shape[0], shape[1], rects);
  for (const [radius, sha256] of Object.entries(feathers)) {
    assert.equal(hash(gaussianBlurred(white, Number(radius)).data), sha256, `radius ${radius}`);
  }
});

for (const [name, { manifest, shape, rects, options, alpha, grey, changes }] of Object.entries(golden.pictures)) {
  test(`picture: ${name}`, async () => {
    const image = pictureOf(shape[0], shape[1], { alpha, grey });
    const given = image.data.slice();
    const steps = [];
    const result = await inpaint(
      new SimpleSessions(),
      golden.manifests[manifest ?? "small"],
      image,
      maskOf(shape[0], shape[1], rects),
      options,
      ({ done, total }) => steps.push([done, total]),
    );
    assert.deepEqual(image.data, given, "the given picture is unchanged");
    const channels = grey ? 1 : 3;
    const expected = inflateSync(Buffer.from(changes, "base64"));
    let [different, most, changed] = [0, 0, 0];
    for (let y = 0, i = 0; y < shape[0]; y += golden.rows) {
      for (let x = 0; x < shape[1]; x++) {
        const at = (y * shape[1] + x) * 4;
        assert.equal(result.data[at + 3], given[at + 3], "alpha is kept");
        for (let c = 0; c < 3; c++) {
          const wanted = (given[at + c] + expected[i + (grey ? 0 : c)]) & 255;
          const apart = Math.abs(result.data[at + c] - wanted);
          changed += Number(wanted !== given[at + c]);
          different += Number(apart > 0);
          most = Math.max(most, apart);
        }
        i += channels;
      }
    }
    assert.ok(changed > 50, `${changed} values change`);
    // A value on the edge of two levels may fall on either side: the network's sums differ in their last bit.
    assert.ok(most <= 1 && different <= 0.002 * changed, `${different} of ${changed} values differ, by up to ${most}`);
    const [, total] = steps[0];
    assert.deepEqual(steps[0], [0, total]);
    assert.deepEqual(steps[steps.length - 1], [total, total]);
  });
}

const small = golden.manifests.small;
const blob = [[30, 40, 52, 66]];

test("nothing under the mask and no invisible colour influences the result, and all else stays", async () => {
  for (const wanted of [{}, { mode: "fast", blend: "hard", compensate_colour: true }, { start: "pixels", fit: "whole" }]) {
    const options = { ...wanted, mask_dilate: 0 };
    const mask = maskOf(100, 130, [...blob, [0, 100, 40, 130], [70, 5, 75, 9]]);
    const image = pictureOf(100, 130, { alpha: true });
    const other = { ...image, data: image.data.slice() };
    for (let i = 0; i < mask.data.length; i++) {
      if (mask.data[i] || !image.data[i * 4 + 3]) for (let c = 0; c < 3; c++) other.data[i * 4 + c] ^= 255;
    }
    const results = [];
    for (const given of [image, other]) results.push(await inpaint(new SimpleSessions(), small, given, mask, options));
    for (let i = 0; i < mask.data.length; i++) {
      const [a, b] = results.map(({ data }) => data.subarray(i * 4, i * 4 + 4));
      if (mask.data[i] || image.data[i * 4 + 3]) assert.deepEqual(a, b);
      else assert.deepEqual(a, image.data.subarray(i * 4, i * 4 + 4), "an invisible pixel stays");
    }
  }
});

test("a picture a pixel wider than the square is not reached on both sides: as in tests/runtime/test_squares.py", () => {
  const points = [[11, 61], [13, 43], [36, 81], [37, 57], [43, 16], [58, 24], [81, 5], [86, 100], [103, 90]];
  const rects = points.map(([y, x]) => [y, x, y + 1, x + 1]);
  const found = findSquares(maskOf(126, 101, rects, 1), 100).map(({ crop }) => [crop.left, crop.top]);
  assert.deepEqual(found, [[1, 26], [0, 0]]);
});

test("a run takes one graph of the U-Net: the conditional branch alone only where no step has guidance", async () => {
  const mask = maskOf(100, 130, blob);
  for (const [options, expected] of [
    [{ steps: 3 }, "unet"],
    [{ steps: 3, guidance_interval: [300, 999] }, "unet"],
    [{ mode: "fast" }, "unet"],
    [{ steps: 3, guidance_scale: 1 }, "unet_conditional"],
    [{ steps: 3, guidance_interval: [998, 998] }, "unet_conditional"],
  ]) {
    const sessions = new SimpleSessions();
    await inpaint(sessions, small, pictureOf(100, 130), mask, options);
    const taken = sessions.runs.filter((graph) => graph.startsWith("unet"));
    assert.deepEqual([...new Set(taken)], [expected]);
    assert.equal(taken.length, 3);
  }
});

test("squares of a run go through one graph before the next, and an abort ends the work within a step", async () => {
  const rects = [...blob, [10, 110, 14, 115], [85, 10, 90, 13], [90, 180, 95, 186], [5, 200, 9, 204]];
  const mask = maskOf(100, 230, rects);
  const sessions = new SimpleSessions();
  const pictures = [];
  await inpaint(sessions, small, pictureOf(100, 230), mask, { steps: 2 }, ({ picture }) => picture && pictures.push(picture));
  const stages = sessions.runs.filter((graph, i) => graph !== sessions.runs[i - 1]);
  assert.ok(pictures.length < sessions.runs.filter((graph) => graph === "vae_encoder").length, "a run has several squares");
  assert.equal(stages.length, 3 * pictures.length);
  const controller = new AbortController();
  const aborted = new SimpleSessions();
  const run = inpaint(
    aborted,
    small,
    pictureOf(100, 230),
    mask,
    { steps: 3 },
    ({ done }) => done === 1 && controller.abort(),
    controller.signal,
  );
  await assert.rejects(run, { name: "AbortError" });
  assert.equal(aborted.runs.filter((graph) => graph === "unet").length, 1);
});

test("an abort that arrives as an event of its own, between two runs that never wait, is heard", async () => {
  const controller = new AbortController();
  const sessions = new SimpleSessions();
  setTimeout(() => controller.abort(), 0);
  const run = inpaint(sessions, small, pictureOf(100, 130), maskOf(100, 130, blob), { steps: 900 }, undefined, controller.signal);
  await assert.rejects(run, { name: "AbortError" });
  assert.ok(sessions.runs.length < 100, `${sessions.runs.length} runs`);
});

test("options, masks and pictures that cannot be served are refused in words, before any graph runs", async () => {
  /** @type {[Record<string, unknown>, RegExp][]} */
  const cases = [
    [{ mode: "slow" }, /mode "slow": expected one of reference, best, balanced, fast/],
    [{ speed: 3 }, /speed 3: expected no such option/],
    [{ toString: 3 }, /toString 3: expected no such option/],
    [{ steps: 0 }, /steps 0: expected a whole number/],
    [{ steps: 1001 }, /1001 steps/],
    [{ steps: 2, strength: 0.1 }, /one is kept/],
    [{ strength: NaN }, /strength NaN: expected a number above 0/],
    [{ guidance_scale: "3" }, /guidance_scale "3": expected a number/],
    [{ guidance_interval: [5, 2] }, /guidance_interval \[5,2\]/],
    [{ seed: -1 }, /seed -1: expected a whole number from 0/],
    [{ mask_dilate: 0.5 }, /mask_dilate 0.5: expected auto/],
    [{ mask_dilate: 500 }, /grown by 500 pixels, marks every pixel/],
    [{ mode: "reference", start: "cells" }, /mode reference starts from the picture itself/],
    [{ sampler: "lcm" }, /not distilled for it/],
    [{ vae_decoder: "tiny", decode: "masked" }, /always decodes the whole square/],
    [{ max_squares: 1, mask_dilate: 0 }, /more than the limit of 1/],
  ];
  const mask = maskOf(300, 300, [[3, 3, 9, 9], [280, 280, 290, 290]]);
  for (const [options, words] of cases) {
    const sessions = new SimpleSessions();
    const run = inpaint(sessions, small, pictureOf(300, 300), mask, options);
    await assert.rejects(run, (error) => error.name === "InputError" && words.test(error.message), String(words));
    assert.deepEqual(sessions.runs, []);
  }
  const image = pictureOf(80, 70);
  for (const [rects, words] of [
    [[], /marks nothing/],
    [[[0, 0, 80, 70]], /marks every pixel/],
  ]) {
    await assert.rejects(inpaint(new SimpleSessions(), small, image, maskOf(80, 70, rects)), words);
  }
  await assert.rejects(inpaint(new SimpleSessions(), small, image, maskOf(70, 80, blob)), /mask is 80x70 .*picture 70x80/);
  const clear = { ...image, data: image.data.map((value, i) => (i % 4 === 3 ? 0 : value)) };
  await assert.rejects(inpaint(new SimpleSessions(), small, clear, maskOf(80, 70, blob)), /every visible pixel/);
  await assert.rejects(inpaint(new SimpleSessions(), small, { ...image, width: 60 }, maskOf(80, 60, blob)), /4 bytes a pixel/);
});

test("what a bundle lacks: an explicit option is refused, a mode's default is replaced with a note", async () => {
  const bare = { ...small, decoders: {} };
  const [image, mask] = [pictureOf(100, 130), maskOf(100, 130, blob)];
  await assert.rejects(inpaint(new SimpleSessions(), bare, image, mask, { decode: "masked" }), /no graph vae_decoder_lower/);
  await assert.rejects(inpaint(new SimpleSessions(), bare, image, mask, { vae_decoder: "tiny" }), /no graph vae_decoder_tiny/);
  const { notes } = await inpaint(new SimpleSessions(), bare, image, mask, { mode: "fast" });
  assert.match(notes.join(), /decode faster/);
  const conditional = { ...small, graphs: { ...small.graphs } };
  delete conditional.graphs.unet;
  await assert.rejects(inpaint(new SimpleSessions(), conditional, image, mask, {}), /guidance_scale 2: this site's network/);
  const sessions = new SimpleSessions();
  await inpaint(sessions, conditional, image, mask, { guidance_scale: 1 });
  assert.ok(sessions.runs.includes("unet_conditional"));
});

test("a graph's output that is no picture is refused", async () => {
  /** @type {[string, (output: {data: Float32Array, dims: number[]}) => void, RegExp][]} */
  const faults = [
    ["vae_encoder", ({ data }) => (data[3] = NaN), /vae_encoder holds NaN/],
    ["unet", ({ data }) => data.fill(0.5), /unet is one constant/],
    ["vae_decoder", ({ data }) => data.forEach((value, i) => (data[i] = 2 + value / 100)), /one flat colour/],
    ["vae_decoder", (output) => (output.dims = [1, 3, 32, 128]), /vae_decoder gave \[1,3,32,128\]/],
  ];
  for (const [name, spoil, words] of faults) {
    const sessions = {
      /** @param {string} graph @param {Record<string, any>} feeds */
      async run(graph, feeds) {
        const outputs = await new SimpleSessions().run(graph, feeds);
        if (graph === name) Object.values(outputs).forEach(spoil);
        return outputs;
      },
    };
    const run = inpaint(sessions, small, pictureOf(100, 130), maskOf(100, 130, blob), {});
    await assert.rejects(run, (error) => error.name === "OutputError" && words.test(error.message), String(words));
  }
});

for (const [name, { shape, rects, alpha, grey, share }] of Object.entries(golden.edges)) {
  test(`edge along the border: ${name}`, () => {
    const mask = maskOf(shape[0], shape[1], rects, 1);
    const got = edgeShare(pictureOf(shape[0], shape[1], { alpha, grey }), mask);
    assert.ok(Math.abs(got - share) < 1e-4, `${got}, expected ${share}`); // luma is float64 here and float32 there
  });
}

test("notes on a mask and on settings that are probably not what the person wants", async () => {
  /** @param {number[][]} rects @param {object} options @param {boolean} alpha */
  const notesOf = async (rects, options, alpha = false) =>
    (await inpaint(new SimpleSessions(), small, pictureOf(100, 130, { alpha }), maskOf(100, 130, rects), options)).notes.join();
  assert.match(await notesOf([[0, 0, 90, 130]], {}), /marks 90% of the picture/);
  assert.match(await notesOf(blob, {}, true), /of the masked pixels are transparent/);
  assert.match(await notesOf([[16, 32, 48, 64]], { mask_dilate: 0 }), /an edge of the picture runs along \d+% of the mask's border/);
  assert.match(await notesOf(blob, { mode: "reference" }), /may show through/);
  assert.match(await notesOf(blob, { steps: 1 }), /little noise is left/);
  assert.equal(await notesOf(blob, { steps: 4 }), "");
});
