// The check of a device: inputs and sketch against what moebius_runtime computes (scripts/page_golden.py), and verdicts.

import assert from "node:assert/strict";
import { webcrypto } from "node:crypto";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import {
  checkInputs,
  differingElements,
  inputsDigest,
  relativeError,
} from "../../runtimes/moebius_serve/page/js/engine/check_values.js";
import { DeviceCheck } from "../../runtimes/moebius_serve/page/js/site/device_check.js";

import { memory } from "./memory.js";

const golden = JSON.parse(readFileSync(new URL("../golden/page_engine.json", import.meta.url), "utf8"));
const subtle = /** @type {any} */ (webcrypto.subtle);

/** The output of the golden check values. */
const right = () => Float32Array.from({ length: 1001 }, (_, i) => ((i * 7919) % 1009) / 1009 - 0.5);

/** @param {number[]} places @param {number} [off] */
function wrong(places, off = 0.25) {
  const output = right();
  for (const place of places) output[place] += off;
  return output;
}

for (const { inputs, check, sums, shapes, wrong: bad } of golden.checks) {
  const info = { inputs, outputs: [] };
  const title = inputs.map((/** @type {any} */ tensor) => `${tensor.name} [${tensor.shape}]`).join(", ");

  test(`the inputs are the export's to the bit: ${title}`, async () => {
    const drawn = checkInputs(info, check.drawn);
    assert.deepEqual(Object.fromEntries(Object.entries(drawn).map(([name, { dims }]) => [name, dims])), shapes);
    for (const [name, { data }] of Object.entries(drawn)) {
      const sum = Array.from(data, Number).reduce((all, value) => all + value, 0);
      assert.ok(Math.abs(sum - sums[name]) < 1e-9 * data.length, name);
    }
    assert.equal(await inputsDigest(drawn, subtle), check.inputs_sha256);
  });

  test(`the relative error is the runtime's: ${title}`, () => {
    assert.ok(relativeError(check, right()) < 1e-12); // the sketch is of this output; float64 sums in another order
    const error = relativeError(check, wrong(bad.places));
    assert.ok(Math.abs(error - bad.error) < 1e-9, `${error}, expected ${bad.error}`);
    assert.equal(differingElements(check, wrong(bad.places)), bad.words);
    assert.equal(relativeError(check, wrong([1000], NaN)), Infinity);
    assert.match(differingElements(check, wrong([1000], NaN)), /^element 1000 is NaN/);
  });
}

const { inputs, check } = golden.checks[0];
const computes = /** @type {const} */ ({ provider: "webgpu", device: "the GPU (a b)", versions: "Browser 1" });
const graphs = { unet: { model: [{ sha256: "a", size: 1 }], data: { w: [{ sha256: "b", size: 1 }] }, nodes: 1 } };

/** @param {any} [changes] of the site */
function siteOf(changes = {}) {
  const manifest = { graphs: { unet: { inputs, outputs: [] } }, checks: { unet: check } };
  return { manifest, graphs, tolerance: 3e-4, precision: "fp32", ...changes };
}

/** @param {any} caches @param {any} [site] */
const checkOf = (caches, site = siteOf()) => new DeviceCheck(site, new URL("https://site.example/a/"), { caches, subtle });

/** A graph's runs. @param {() => Float32Array} output */
function runsOf(output) {
  /** @type {any[]} */
  const runs = [];
  return { runs, run: async (/** @type {any} */ given) => (runs.push(given), output()) };
}

test("a right device is checked once, by device, versions, provider, graph and check values", async () => {
  const caches = memory();
  const { runs, run } = runsOf(right);
  for (let i = 0; i < 2; i++) assert.equal(await checkOf(caches).check("unet", computes, run), null);
  assert.equal(runs.length, 1);
  assert.deepEqual(runs[0].sample.dims, [1, 9, 6, 6]);
  const others = [
    { ...computes, device: "another" },
    { ...computes, versions: "Browser 2" },
    { ...computes, provider: /** @type {const} */ ("wasm") },
  ];
  for (const other of others) await checkOf(caches).check("unet", other, run);
  const file = { unet: { ...graphs.unet, data: { w: [{ sha256: "c", size: 1 }] } } };
  await checkOf(caches, siteOf({ graphs: file })).check("unet", computes, run);
  await checkOf(caches, siteOf({ precision: "fp16" })).check("unet", computes, run);
  assert.equal(runs.length, 6);
  await checkOf(caches).clear();
  await checkOf(caches).check("unet", computes, run);
  assert.equal(runs.length, 7);
});

test("a wrong device is refused in words, the next time without a run", async () => {
  const caches = memory();
  const { runs, run } = runsOf(() => wrong([142, 500]));
  for (let i = 0; i < 2; i++) {
    await assert.rejects(checkOf(caches).check("unet", computes, run), (/** @type {any} */ error) => {
      assert.equal(error.name, "DeviceError");
      assert.match(error.message, /^the GPU \(a b\) computes unet wrongly \(Browser 1\): relative error \d\.\de-2, at most 3e-4/);
      assert.match(error.message, /element 142 is .*choose WebAssembly/);
      return true;
    });
  }
  assert.equal(runs.length, 1);
  const wasm = { ...computes, provider: /** @type {const} */ ("wasm"), device: "WebAssembly" };
  await assert.rejects(checkOf(caches).check("unet", wasm, run), /WebAssembly computes unet wrongly.*To go on, use another browser/);
});

test("NaN and infinity are refused, and stay so in a kept verdict", async () => {
  for (const value of [NaN, Infinity]) {
    const caches = memory();
    const { runs, run } = runsOf(() => wrong([7], value));
    for (let i = 0; i < 2; i++) {
      await assert.rejects(checkOf(caches).check("unet", computes, run), /relative error Infinity/);
    }
    assert.equal(runs.length, 1);
  }
});

test("an error under the tolerance passes, one above does not", async () => {
  const { norm } = check;
  for (const [share, passes] of [[0.3, true], [3, false]]) {
    const off = (3e-4 * Number(share) * norm) / Math.sqrt(1001);
    const { run } = runsOf(() => right().map((value, i) => value + (i % 2 ? off : -off)));
    const checked = checkOf(memory()).check("unet", computes, run);
    await (passes ? checked : assert.rejects(checked, /wrongly/));
  }
});

test("what cannot be checked is noted", async () => {
  const { runs, run } = runsOf(right);
  const without = siteOf({ manifest: { ...siteOf().manifest, checks: {} } });
  assert.match(String(await checkOf(memory(), without).check("unet", computes, run)), /holds no values to check/);
  const other = { ...check, inputs_sha256: "0".repeat(64) };
  const foreign = siteOf({ manifest: { ...siteOf().manifest, checks: { unet: other } } });
  assert.match(String(await checkOf(memory(), foreign).check("unet", computes, run)), /draws other inputs/);
  assert.equal(runs.length, 0);
});

test("a damaged verdict and a full disk lead to another check", async () => {
  const caches = memory();
  const { runs, run } = runsOf(right);
  await checkOf(caches).check("unet", computes, run);
  for (const bad of ["", "{", "[]", '{"error": 0, "words": ""}', "null"]) {
    for (const address of caches.kept.keys()) caches.kept.set(address, new TextEncoder().encode(bad));
    assert.equal(await checkOf(caches).check("unet", computes, run), null);
  }
  assert.equal(runs.length, 6);
  const full = memory(true);
  for (let i = 0; i < 2; i++) assert.equal(await checkOf(full).check("unet", computes, run), null);
  assert.equal(runs.length, 8);
});
