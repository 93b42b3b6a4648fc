// The graphs in a runtime of the tests: one in memory at a time, checked devices, a lost GPU, too little memory.

import assert from "node:assert/strict";
import { test } from "node:test";

import { DeviceError } from "../../runtimes/moebius_serve/page/js/engine/errors.js";
import { FatalError, Sessions } from "../../runtimes/moebius_serve/page/js/site/sessions.js";
import { StorageError } from "../../runtimes/moebius_serve/page/js/site/storage.js";

const shard = (/** @type {string} */ sha256, size = 4) => ({ sha256, size });
const graphs = {
  encoder: { model: [shard("m1")], data: { "w.bin": [shard("w1"), shard("w2")] }, nodes: 1 },
  unet: { model: [shard("m2")], data: {}, nodes: 1 },
};
const feeds = { x: { data: Float32Array.of(1, 2), dims: [2] } };

/** @param {any} [changes] */
function world({ provider = "wasm", run, create, get, check } = /** @type {any} */ ({})) {
  /** @type {string[]} */
  const log = [];
  /** @type {(info: any) => void} */
  let lose = () => {};
  const device = { lost: new Promise((resolve) => (lose = resolve)), adapterInfo: { vendor: "acme", architecture: "x1" } };
  const ort = {
    env: { versions: { web: "1.2.3" }, webgpu: { device: Promise.resolve(device) } },
    Tensor: class {
      /** @param {string} type @param {any} data @param {number[]} dims */
      constructor(type, data, dims) {
        Object.assign(this, { type, data, dims });
      }
    },
    InferenceSession: {
      create: async (/** @type {Uint8Array} */ model, /** @type {any} */ options) => {
        log.push(`create ${new TextDecoder().decode(model)} on ${options.executionProviders}`);
        if (create) await create(options);
        return {
          run: run ?? (async (/** @type {any} */ given) => ({ y: { data: given.x.data.map((v) => v * 2), dims: given.x.dims } })),
          release: async () => void log.push("release"),
        };
      },
    },
  };
  const storage = { get: get ?? (async (/** @type {any} */ { sha256 }) => new TextEncoder().encode(sha256)) };
  const deviceCheck = { check: check ?? (async () => null) };
  /** @type {any[]} */
  const loads = [];
  const onLoad = (/** @type {string} */ graph, /** @type {any} */ loaded) => loads.push([graph, loaded?.done ?? null]);
  const any = (/** @type {any} */ value) => value;
  const sessions = new Sessions(any(ort), graphs, any(storage), provider, any(deviceCheck), onLoad);
  return { sessions, log, loads, lose };
}

test("a graph is released before the next one is read, and its parts are joined", async () => {
  /** @type {any[]} */
  const given = [];
  const { sessions, log, loads } = world({ create: async (/** @type {any} */ options) => given.push(options.externalData) });
  assert.deepEqual(await sessions.run("encoder", feeds), { y: { data: Float32Array.of(2, 4), dims: [2] } });
  await sessions.run("encoder", feeds);
  await sessions.run("unet", feeds);
  await sessions.release();
  assert.deepEqual(log, ["create m1 on wasm", "release", "create m2 on wasm", "release"]);
  assert.deepEqual(given[0], [{ path: "w.bin", data: new TextEncoder().encode("w1w2") }]);
  assert.deepEqual(loads.filter(([graph]) => graph === "encoder").map(([, done]) => done), [4, 8, 12]);
});

test("each graph is checked once it is loaded, with the device's name; notes are kept once", async () => {
  /** @type {any[]} */
  const checked = [];
  const check = async (/** @type {string} */ graph, /** @type {any} */ computes, /** @type {any} */ run) => {
    checked.push([graph, computes, Array.from(await run(feeds))]);
    return "a note";
  };
  for (const [provider, name] of [["wasm", "WebAssembly"], ["webgpu", "the GPU (acme x1)"]]) {
    const { sessions, loads } = world({ provider, check });
    await sessions.run("encoder", feeds);
    await sessions.run("encoder", feeds);
    await sessions.run("unet", feeds);
    const [graph, computes, output] = checked[0];
    assert.equal(checked.length, 2);
    assert.deepEqual([graph, computes.provider, computes.device, output], ["encoder", provider, name, [2, 4]]);
    assert.match(computes.versions, /^onnxruntime-web 1\.2\.3, /);
    assert.deepEqual([...sessions.notes], ["a note"]);
    assert.ok(loads.some(([graph, done]) => graph === "encoder" && done === null));
    checked.length = 0;
  }
});

test("a refused device keeps no graph, and no graph runs on it", async () => {
  let ran = 0;
  const { sessions, log } = world({
    run: async () => (ran++, {}),
    check: async () => { throw new DeviceError("computes wrongly"); },
  });
  await assert.rejects(sessions.run("encoder", feeds), (error) => error instanceof DeviceError);
  assert.deepEqual([sessions.loaded, log.at(-1), ran], [null, "release", 0]);
});

test("a GPU that is lost ends the run that waits for it, and one that comes later", async () => {
  const { sessions, lose } = world({ provider: "webgpu", run: () => new Promise(() => {}) });
  const waiting = sessions.run("encoder", feeds);
  await new Promise((resolve) => setTimeout(resolve));
  lose({ reason: "unknown", message: "driver reset" });
  const fatal = (/** @type {any} */ error) => error instanceof FatalError && /GPU was lost.*driver reset.*still there/.test(error.message);
  await assert.rejects(waiting, fatal);
  await assert.rejects(sessions.run("encoder", feeds), fatal);
});

test("a GPU that is lost in the check of the device is named, not the device refused", async () => {
  const { sessions, lose } = world({
    provider: "webgpu",
    run: () => new Promise(() => {}),
    check: async (/** @type {any} */ _graph, /** @type {any} */ _computes, /** @type {any} */ run) => run(feeds),
  });
  const waiting = sessions.run("encoder", feeds);
  await new Promise((resolve) => setTimeout(resolve));
  lose({ reason: "destroyed", message: "" });
  await assert.rejects(waiting, (error) => error instanceof FatalError && /lost.*destroyed/.test(error.message));
});

test("too little memory, a graph that cannot be loaded or run, and a cut download are told apart", async () => {
  const failing = (/** @type {any} */ error) => async () => { throw error; };
  const cases = [
    [{ create: failing(new RangeError("Array buffer allocation failed")) }, FatalError, /too little memory for encoder \(0 MB\)/],
    [{ create: failing(new Error("std::bad_alloc")) }, FatalError, /too little memory/],
    [{ create: failing("no kernel for Foo") }, FatalError, /encoder cannot be run here.*no kernel for Foo.*Try again/],
    [{ run: failing(new Error("out of memory")) }, FatalError, /too little memory for encoder/],
    [{ get: failing(new StorageError("was cut")) }, StorageError, /^was cut$/],
  ];
  for (const [changes, kind, words] of cases) {
    const { sessions } = world(changes);
    await assert.rejects(sessions.run("encoder", feeds), (/** @type {any} */ error) => {
      assert.ok(error instanceof /** @type {any} */ (kind));
      assert.match(error.message, /** @type {RegExp} */ (words));
      return true;
    });
  }
});
