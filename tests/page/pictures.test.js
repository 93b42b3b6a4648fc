// Bitmaps that are kept: the least recently used go first, those in use never.

import assert from "node:assert/strict";
import { test } from "node:test";

import { History } from "../../runtimes/moebius_serve/page/js/history.js";
import { Pictures } from "../../runtimes/moebius_serve/page/js/pictures.js";

/** @param {number} width */
function bitmap(width) {
  return { width, height: 10, open: true, close() { this.open = false; } };
}

test("bitmaps over the limit are closed, and decoded again when they are wanted", async () => {
  const decoded = [];
  globalThis.createImageBitmap = async (/** @type {any} */ blob) => {
    decoded.push(blob);
    return bitmap(blob.width);
  };
  const pictures = new Pictures(async (blob) => blob, 300);
  const [a, b, c] = [10, 10, 10].map((width) => ({ blob: { width }, name: "x" }));
  const [first, second] = [await pictures.get(a), await pictures.get(b)];
  assert.equal(await pictures.get(a), first);
  const third = await pictures.get(c);
  pictures.release([third]);
  assert.deepEqual([first.open, second.open, third.open], [true, true, true]); // 300 pixels in all
  pictures.limit = 200;
  pictures.release([third]);
  assert.deepEqual([first.open, second.open, third.open], [true, false, true]); // b was used before a
  pictures.limit = 0;
  pictures.release([third, first]);
  assert.deepEqual([first.open, third.open], [true, true]);
  pictures.release([null]);
  assert.deepEqual([first.open, third.open], [false, false]);
  assert.notEqual(await pictures.get(a), first);
  assert.equal(decoded.length, 4);
});

test("a file that the browser does not decode is asked for as a preview, and a second failure is reported", async () => {
  globalThis.createImageBitmap = async (/** @type {any} */ blob) => {
    if (blob.width < 0) throw new Error("unknown format");
    return bitmap(blob.width);
  };
  const pictures = new Pictures(async () => ({ width: 7 }));
  assert.equal((await pictures.get({ blob: { width: -1 }, name: "a.tif" })).width, 7);
  pictures.preview = async () => ({ width: -1 });
  await assert.rejects(pictures.get({ blob: { width: -1 }, name: "b.tif" }), /unknown format/);
});

test("undo and redo wait for each other, and a change that fails stays where it was", async () => {
  const seen = [];
  const history = new History(() => {});
  /** @type {() => void} */
  let go = () => {};
  history.push({ undo: () => seen.push("a"), redo: () => seen.push("A") });
  history.push({ undo: () => new Promise((resolve) => (go = () => resolve(seen.push("b")))), redo: () => seen.push("B") });
  const undoing = history.undo();
  const next = history.undo(); // in its turn, not lost
  assert.equal(history.busy, true);
  await Promise.resolve();
  assert.deepEqual(seen, []);
  go();
  await Promise.all([undoing, next]);
  assert.deepEqual(seen, ["b", "a"]);
  await history.redo();
  await history.redo();
  await history.redo(); // nothing is left
  assert.deepEqual(seen, ["b", "a", "A", "B"]);
  history.push({ undo: () => Promise.reject(new Error("no picture")), redo: () => {} });
  const failing = history.undo();
  const again = history.undo(); // fails likewise, and nothing behind it is undone
  await assert.rejects(failing, /no picture/);
  await assert.rejects(again, /no picture/);
  assert.equal(history.done.length, 3);
  assert.equal(history.busy, false);
});
