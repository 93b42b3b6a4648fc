// Masks as arrays: golden values, and slow obvious references.

import assert from "node:assert/strict";
import { test } from "node:test";

import { grown, inverted, pack, shrunk, unpack } from "../../runtimes/moebius_serve/page/js/bits.js";

test("pack puts the first value into the lowest bit", () => {
  assert.deepEqual([...pack(Uint8Array.from([1, 0, 0, 0, 0, 0, 0, 1, 0, 1]))], [0b10000001, 0b10]);
  assert.deepEqual([...pack(new Uint8Array(0))], []);
  assert.deepEqual([...unpack(Uint8Array.from([0b10000001, 0b10]), 10)], [1, 0, 0, 0, 0, 0, 0, 1, 0, 1]);
});

test("a point grows to a square, and its corners too", () => {
  const point = new Uint8Array(30); // 6 wide, 5 high
  point[2 * 6 + 3] = 1;
  assert.deepEqual([...grown(point, 6, 1)], [
    0, 0, 0, 0, 0, 0,
    0, 0, 1, 1, 1, 0,
    0, 0, 1, 1, 1, 0,
    0, 0, 1, 1, 1, 0,
    0, 0, 0, 0, 0, 0,
  ]);
  assert.deepEqual(shrunk(grown(point, 6, 1), 6, 1), point);
});

test("what lies beyond the border counts as marked when a mask shrinks", () => {
  const all = new Uint8Array(12).fill(1);
  assert.deepEqual(shrunk(all, 4, 1), all);
  const hole = Uint8Array.from([1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1]); // 4 wide
  assert.deepEqual([...shrunk(hole, 4, 1)], [1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]);
});

/** The definition: any one within `pixels` in both directions. */
function slowly(values, width, pixels) {
  const height = values.length / width;
  return values.map((_, i) => {
    const [x, y] = [i % width, Math.floor(i / width)];
    for (let v = Math.max(0, y - pixels); v <= Math.min(height - 1, y + pixels); v++) {
      for (let u = Math.max(0, x - pixels); u <= Math.min(width - 1, x + pixels); u++) {
        if (values[v * width + u]) return 1;
      }
    }
    return 0;
  });
}

test("random masks agree with the definition, and come back from bits", () => {
  let state = 1;
  const random = () => (state = (state * 48271) % 2147483647) / 2147483647;
  for (const [width, height, pixels] of [[7, 5, 1], [16, 9, 2], [1, 20, 3], [20, 1, 4], [13, 17, 30], [5, 5, 0]]) {
    const values = Uint8Array.from({ length: width * height }, () => Number(random() < 0.08));
    assert.deepEqual(grown(values, width, pixels), slowly(values, width, pixels));
    assert.deepEqual(shrunk(values, width, pixels), inverted(slowly(inverted(values), width, pixels)));
    assert.deepEqual(unpack(pack(values), values.length), values);
  }
});
