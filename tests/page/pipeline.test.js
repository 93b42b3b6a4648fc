// The engine against what moebius_runtime computes: tests/golden/page_pictures.json (scripts/page_pictures_golden.py).

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { inflateSync } from "node:zlib";

import { outwardFeather } from "../../runtimes/moebius_serve/page/js/engine/blend.js";
import { gaussianBlurred } from "../../runtimes/moebius_serve/page/js/engine/blur.js";
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
