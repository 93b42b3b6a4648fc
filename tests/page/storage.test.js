// The shards' storage: resume after a cut, hash check, nothing kept half, a full disk.

import assert from "node:assert/strict";
import { createHash, webcrypto } from "node:crypto";
import { test } from "node:test";

import { Storage, StorageError } from "../../runtimes/moebius_serve/page/js/site/storage.js";

import { memory } from "./memory.js";

const content = Uint8Array.from({ length: 1000 }, (_, i) => (i * 7) % 251);
const shard = { sha256: createHash("sha256").update(content).digest("hex"), size: content.length };

/** @param {((range: string | null) => Response)[]} answers @param {boolean} [full] */
function storageOf(answers, full) {
  const caches = memory(full);
  /** @type {(string | null)[]} */
  const ranges = [];
  const fetch = async (/** @type {URL} */ _address, /** @type {any} */ { headers }) => {
    const range = headers.range ?? null;
    ranges.push(range);
    const answer = answers.length > 1 ? answers.shift() : answers[0];
    return /** @type {any} */ (answer)(range);
  };
  const use = /** @type {any} */ ({ fetch, caches, subtle: webcrypto.subtle, pause: async () => {} });
  return { storage: new Storage(new URL("https://site.example/a/"), use), caches, ranges };
}

const whole = () => new Response(content.slice());
const cut = (/** @type {number} */ end) => () => new Response(content.slice(0, end));
const rest = (/** @type {string | null} */ range) => {
  const start = Number(/bytes=(\d+)-/.exec(range ?? "")?.[1]);
  return new Response(content.slice(start), { status: 206, headers: { "content-range": `bytes ${start}-999/1000` } });
};

test("a shard is downloaded once, checked and kept", async () => {
  const { storage, ranges } = storageOf([whole]);
  assert.equal(await storage.stored([shard]), 0);
  assert.deepEqual(await storage.get(shard), content);
  assert.deepEqual(await storage.get(shard), content);
  assert.deepEqual(ranges, [null]);
  assert.equal(await storage.stored([shard]), 1000);
  await storage.clear();
  assert.equal(await storage.stored([shard]), 0);
});

test("a cut download goes on where it ended", async () => {
  const { storage, ranges } = storageOf([cut(300), rest]);
  assert.deepEqual(await storage.get(shard), content);
  assert.deepEqual(ranges, [null, "bytes=300-"]);
});

test("a server without ranges sends the whole again", async () => {
  const { storage } = storageOf([cut(300), whole]);
  assert.deepEqual(await storage.get(shard), content);
});

test("a connection that stays cut keeps nothing half, and the next try goes on", async () => {
  const { storage, caches, ranges } = storageOf([cut(300), () => { throw new TypeError("offline"); }]);
  await assert.rejects(storage.get(shard), (error) => error instanceof StorageError && /was cut \(offline\)/.test(error.message));
  assert.equal(caches.kept.size, 0);
  storage.use.fetch = /** @type {any} */ (async (/** @type {URL} */ _, /** @type {any} */ { headers }) => rest(headers.range));
  assert.deepEqual(await storage.get(shard), content);
  assert.equal(ranges[1], "bytes=300-");
});

test("a damaged shard is refused after a second try and not kept", async () => {
  const bad = () => new Response(content.map((value, i) => (i === 500 ? value ^ 1 : value)));
  const { storage, caches, ranges } = storageOf([bad]);
  await assert.rejects(storage.get(shard), /came damaged/);
  assert.equal(ranges.length, 2);
  assert.equal(caches.kept.size, 0);
  const long = storageOf([() => new Response(new Uint8Array(1001))]);
  await assert.rejects(long.storage.get(shard), /came damaged/);
});

test("a shard that was damaged on the disk is downloaded again", async () => {
  const { storage, caches, ranges } = storageOf([whole]);
  caches.kept.set(`https://site.example/a/shards/${shard.sha256}.bin`, new Uint8Array(1000));
  assert.deepEqual(await storage.get(shard), content);
  assert.equal(ranges.length, 1);
});

test("a missing shard and a full disk are said in words", async () => {
  await assert.rejects(storageOf([() => new Response("", { status: 404 })]).storage.get(shard), /has no shards.*404/);
  const { storage, caches } = storageOf([whole], true);
  await assert.rejects(storage.get(shard), /no room for the model/);
  assert.equal(caches.kept.size, 0);
});
