// The mask: what is painted, in tiles, so that a stroke on a large picture touches little memory.

import { pack, unpack } from "./bits.js";

export const TILE = 512;
const COLOUR = "rgb(255,60,60)";

/** @typedef {{x: number, y: number}} Point */
/** @typedef {Map<string, Uint8Array | null>} Saved bits of each touched tile before a change; null: an empty tile */

export class Mask {
  /** @param {number} width @param {number} height in pixels of the picture */
  constructor(width, height) {
    this.width = width;
    this.height = height;
    /** @type {Map<string, {x: number, y: number, canvas: HTMLCanvasElement, context: CanvasRenderingContext2D}>} */
    this.tiles = new Map();
    /** @type {Saved | null} */
    this.saved = null;
    /** @type {Saved | null} the tiles of a mask that is not shown, see `fold` */
    this.folded = null;
  }

  /** Turns the tiles into bits, a thirty-second of their memory, until the mask is shown again. */
  fold() {
    this.folded ??= new Map([...this.tiles.keys()].map((key) => [key, this.#bits(key)]));
    this.tiles.clear();
  }

  /** Makes the tiles of a folded mask again. */
  unfold() {
    const folded = this.folded;
    this.folded = null;
    for (const [key, bits] of folded ?? []) this.#write(key, bits);
  }

  /** Begins a change that can be undone; `end` gives what was there before. */
  begin() {
    this.saved = new Map();
  }

  /** @returns {Saved | null} null where nothing was touched */
  end() {
    const saved = this.saved;
    this.saved = null;
    return saved && saved.size ? saved : null;
  }

  /**
   * Draws with a tool into every tile that the shape reaches.
   * @param {boolean} erase
   * @param {{left: number, top: number, right: number, bottom: number}} box of the shape
   * @param {(context: CanvasRenderingContext2D) => void} draw in the picture's coordinates
   */
  paint(erase, box, draw) {
    const first = { x: Math.max(0, Math.floor(box.left / TILE)), y: Math.max(0, Math.floor(box.top / TILE)) };
    const last = {
      x: Math.min(Math.ceil(this.width / TILE) - 1, Math.floor(box.right / TILE)),
      y: Math.min(Math.ceil(this.height / TILE) - 1, Math.floor(box.bottom / TILE)),
    };
    for (let y = first.y; y <= last.y; y++) {
      for (let x = first.x; x <= last.x; x++) {
        const key = `${x},${y}`;
        if (erase && !this.tiles.has(key)) continue;
        this.#remember(key);
        const { context } = this.#tile(x, y);
        context.save();
        context.globalCompositeOperation = erase ? "destination-out" : "source-over";
        context.translate(-x * TILE, -y * TILE);
        context.fillStyle = context.strokeStyle = COLOUR;
        draw(context);
        context.restore();
      }
    }
  }

  /**
   * A line of round ends; a dab where both points are one.
   * @param {Point} from @param {Point} to @param {number} size diameter @param {boolean} erase
   */
  line(from, to, size, erase) {
    const r = size / 2 + 1;
    const box = {
      left: Math.min(from.x, to.x) - r,
      top: Math.min(from.y, to.y) - r,
      right: Math.max(from.x, to.x) + r,
      bottom: Math.max(from.y, to.y) + r,
    };
    this.paint(erase, box, (context) => {
      context.lineCap = context.lineJoin = "round";
      context.lineWidth = size;
      context.beginPath();
      context.moveTo(from.x, from.y);
      context.lineTo(to.x === from.x && to.y === from.y ? to.x + 0.01 : to.x, to.y);
      context.stroke();
    });
  }

  /** @param {Point[]} points of a closed polygon @param {boolean} erase */
  fill(points, erase) {
    const xs = points.map((p) => p.x);
    const ys = points.map((p) => p.y);
    const box = { left: Math.min(...xs), top: Math.min(...ys), right: Math.max(...xs), bottom: Math.max(...ys) };
    this.paint(erase, box, (context) => {
      context.beginPath();
      points.forEach((p, i) => (i ? context.lineTo(p.x, p.y) : context.moveTo(p.x, p.y)));
      context.closePath();
      context.fill();
    });
  }

  /** @returns {Uint8Array} 0 and 1, row by row, of the whole picture */
  values() {
    const all = new Uint8Array(this.width * this.height);
    for (const { x, y, context } of this.tiles.values()) {
      const left = x * TILE;
      const top = y * TILE;
      const wide = Math.min(TILE, this.width - left);
      const tall = Math.min(TILE, this.height - top);
      const data = context.getImageData(0, 0, wide, tall).data;
      for (let row = 0; row < tall; row++) {
        const out = (top + row) * this.width + left;
        for (let column = 0; column < wide; column++) {
          if (data[(row * wide + column) * 4 + 3] >= 128) all[out + column] = 1;
        }
      }
    }
    return all;
  }

  /** Replaces everything. @param {Uint8Array} all as `values` gives it */
  set(all) {
    for (let y = 0; y * TILE < this.height; y++) {
      for (let x = 0; x * TILE < this.width; x++) {
        const left = x * TILE;
        const top = y * TILE;
        const wide = Math.min(TILE, this.width - left);
        const tall = Math.min(TILE, this.height - top);
        const values = new Uint8Array(TILE * TILE);
        let any = false;
        for (let row = 0; row < tall; row++) {
          const part = all.subarray((top + row) * this.width + left, (top + row) * this.width + left + wide);
          values.set(part, row * TILE);
          any ||= part.includes(1);
        }
        const key = `${x},${y}`;
        if (!any && !this.tiles.has(key)) continue;
        this.#remember(key);
        this.#write(key, any ? pack(values) : null);
      }
    }
  }

  /** Whether any pixel is marked. */
  get marked() {
    for (const { context } of this.tiles.values()) {
      const data = context.getImageData(0, 0, TILE, TILE).data;
      for (let i = 3; i < data.length; i += 4) if (data[i] >= 128) return true;
    }
    return false;
  }

  /**
   * Puts tiles back; gives what they replaced, so that it can be put back in turn.
   * @param {Saved} saved @returns {Saved}
   */
  restore(saved) {
    /** @type {Saved} */
    const replaced = new Map();
    for (const [key, bits] of saved) {
      replaced.set(key, this.#bits(key));
      this.#write(key, bits);
    }
    return replaced;
  }

  /** @returns {Promise<Blob>} white on black, a PNG of the picture's size */
  async toBlob() {
    const canvas = document.createElement("canvas");
    canvas.width = this.width;
    canvas.height = this.height;
    const context = must(canvas.getContext("2d"));
    const all = this.values();
    const strip = Math.max(1, Math.floor((1 << 22) / this.width)); // rows at a time, so that memory stays small
    for (let top = 0; top < this.height; top += strip) {
      const rows = Math.min(strip, this.height - top);
      const image = context.createImageData(this.width, rows);
      const words = new Uint32Array(image.data.buffer);
      const offset = top * this.width;
      for (let i = 0; i < words.length; i++) words[i] = all[offset + i] ? 0xffffffff : 0xff000000;
      context.putImageData(image, 0, top);
    }
    return new Promise((resolve, reject) =>
      canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("the mask could not be encoded"))), "image/png"),
    );
  }

  /** @param {string} key */
  #remember(key) {
    if (this.saved && !this.saved.has(key)) this.saved.set(key, this.#bits(key));
  }

  /** @param {string} key @returns {Uint8Array | null} */
  #bits(key) {
    const tile = this.tiles.get(key);
    if (!tile) return null;
    const data = tile.context.getImageData(0, 0, TILE, TILE).data;
    const values = new Uint8Array(TILE * TILE);
    for (let i = 0; i < values.length; i++) values[i] = data[i * 4 + 3] >= 128 ? 1 : 0;
    return pack(values);
  }

  /** @param {string} key @param {Uint8Array | null} bits */
  #write(key, bits) {
    if (bits === null) {
      this.tiles.delete(key);
      return;
    }
    const [x, y] = key.split(",").map(Number);
    const { context } = this.#tile(x, y);
    const image = context.createImageData(TILE, TILE);
    const words = new Uint32Array(image.data.buffer);
    const values = unpack(bits, TILE * TILE);
    for (let i = 0; i < words.length; i++) words[i] = values[i] ? 0xff3c3cff : 0;
    context.putImageData(image, 0, 0);
  }

  /** @param {number} x @param {number} y */
  #tile(x, y) {
    const key = `${x},${y}`;
    let tile = this.tiles.get(key);
    if (!tile) {
      const canvas = document.createElement("canvas");
      canvas.width = canvas.height = TILE;
      tile = { x, y, canvas, context: must(canvas.getContext("2d", { willReadFrequently: true })) };
      this.tiles.set(key, tile);
    }
    return tile;
  }
}

/**
 * @template T
 * @param {T | null} value
 * @returns {T}
 */
export function must(value) {
  if (value === null) throw new Error("this browser has no canvas to draw on");
  return value;
}
