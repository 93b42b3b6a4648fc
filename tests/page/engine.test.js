// The engine's sampling against what moebius_runtime computes: tests/golden/page_engine.json (scripts/page_golden.py).

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { initialNoise, RandomState } from "../../runtimes/moebius_serve/page/js/engine/random.js";
import { SAMPLERS } from "../../runtimes/moebius_serve/page/js/engine/samplers.js";
import { NoiseSchedule } from "../../runtimes/moebius_serve/page/js/engine/schedule.js";

const golden = JSON.parse(readFileSync(new URL("../golden/page_engine.json", import.meta.url), "utf8"));

/**
 * Equal up to one unit in the last place of float32: `Math.log` may differ from C's in its last bit.
 * @param {ArrayLike<number>} got
 * @param {number[]} expected
 */
function close(got, expected) {
  assert.equal(got.length, expected.length);
  expected.forEach((value, i) => {
    const apart = Math.abs(got[i] - value);
    assert.ok(apart <= 1.2e-7 * Math.max(1, Math.abs(value)), `element ${i}: ${got[i]}, expected ${value}`);
  });
}

test("the generator's bits are NumPy's, over more than one block of its state", () => {
  const state = new RandomState(golden.uniform.seed);
  assert.deepEqual(golden.uniform.values.map(() => state.uniform()), golden.uniform.values);
});

test("a seed that is no whole number of 32 bits is refused", () => {
  for (const seed of [-1, 4294967296, 0.5, NaN]) assert.throws(() => new RandomState(seed), /expected a whole number/);
});

test("the starting noise is the runtime's", () => {
  for (const { seed, offset, values } of golden.noises) close(initialNoise(seed, golden.shape, offset), values);
});

for (const { info, alphas_sha256, noisy, runs } of golden.schedules) {
  const schedule = new NoiseSchedule(info);

  test(`${info.prediction_type}: the schedule is the runtime's to the bit`, () => {
    const bytes = new Uint8Array(schedule.alphasCumprod.buffer);
    assert.equal(createHash("sha256").update(bytes).digest("hex"), alphas_sha256);
    close(schedule.addNoise(initialNoise(1, golden.shape), initialNoise(2, golden.shape), 481), noisy);
  });

  for (const { sampler, steps, strength, start, timesteps, trajectory } of runs) {
    test(`${info.prediction_type}, ${sampler}, ${steps} steps, strength ${strength}`, async () => {
      const { sample, spacing } = SAMPLERS[sampler];
      assert.deepEqual(schedule.inferenceTimesteps(steps, strength, spacing), timesteps);
      const f32 = Math.fround;
      /** @type {Float32Array[]} */
      const seen = [];
      await sample(
        async (x, t) => x.map((value) => f32(f32(0.3) * value) + f32(t / 1000 - 0.4)),
        Float32Array.from(start),
        schedule,
        timesteps,
        (_step, _timestep, latents) => seen.push(latents),
      );
      assert.equal(seen.length, trajectory.length);
      // Bit-exact but for the last bit of Math.log and Math.expm1 in the coefficients: a few units over the steps.
      seen.forEach((latents, step) => {
        const worst = Math.max(...trajectory[step].map((value, i) => Math.abs(latents[i] - value)));
        const largest = Math.max(1, ...trajectory[step].map(Math.abs));
        assert.ok(worst <= 1e-6 * largest, `step ${step}: ${worst} of ${largest}`);
      });
    });
  }
}

test("timesteps that do not fall, and steps that keep nothing, are refused", async () => {
  const schedule = new NoiseSchedule(golden.schedules[0].info);
  for (const timesteps of [[], [5, 5], [5, 7], [1000], [-1], [0.5]]) {
    await assert.rejects(SAMPLERS.ddim.sample(async (x) => x, new Float32Array(4), schedule, timesteps), /falling/);
  }
  for (const [steps, strength] of [[0, 1], [1001, 1], [5, 0], [5, 1.1], [5, 0.1], [2.5, 1]]) {
    assert.throws(() => schedule.inferenceTimesteps(steps, strength), /one is kept/);
  }
  await assert.rejects(
    SAMPLERS.ddim.sample(async (x) => x.map(() => NaN), new Float32Array(4), schedule, [5]),
    /not finite/,
  );
});
