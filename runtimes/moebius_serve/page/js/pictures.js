// Decoded pictures: a file keeps the pixels; bitmaps are large, so only the last few stay in memory.

/**
 * @typedef {object} Picture a file and what it decodes to
 * @property {Blob} blob
 * @property {string} name
 */

const PIXELS = 64e6; // of all bitmaps that are kept: 256 MB

export class Pictures {
  /**
   * @param {(blob: Blob, name: string) => Promise<Blob>} preview of a file that this browser does not decode
   * @param {number} limit pixels of the bitmaps that are kept beside those in use
   */
  constructor(preview, limit = PIXELS) {
    this.preview = preview;
    this.limit = limit;
    /** @type {Map<Blob, ImageBitmap>} the least recently used first */
    this.bitmaps = new Map();
  }

  /**
   * The bitmap of a picture, upright, at full size. It stays valid until `release`.
   * @param {Picture} picture
   * @returns {Promise<ImageBitmap>}
   */
  async get({ blob, name }) {
    const bitmap = this.bitmaps.get(blob) ?? (await this.#decode(blob, name));
    this.bitmaps.delete(blob);
    this.bitmaps.set(blob, bitmap);
    return bitmap;
  }

  /** Closes the least recently used bitmaps over the limit. @param {(ImageBitmap | null)[]} used stay open */
  release(used) {
    let room = this.limit;
    for (const [blob, bitmap] of [...this.bitmaps].reverse()) {
      room -= bitmap.width * bitmap.height;
      if (room < 0 && !used.includes(bitmap)) {
        this.bitmaps.delete(blob);
        bitmap.close();
      }
    }
  }

  /** @param {Blob} blob @param {string} name */
  async #decode(blob, name) {
    try {
      return await createImageBitmap(blob);
    } catch {
      return await createImageBitmap(await this.preview(blob, name)); // TIFF, HEIC: the server's readers know more
    }
  }
}
