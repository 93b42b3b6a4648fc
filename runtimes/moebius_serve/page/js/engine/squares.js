// Finds the squares that the network fills from a mask, and the order to fill them in, as moebius_runtime.regions.squares,
// where the method is described. It runs in Node too.

import { both, boundingBox, components, coverage, dilated, eachOne, empty, eroded, numbered, opened } from "./cells.js";
import { clipped, part, shifted, thickness, union } from "./cells.js";
import { covered } from "./cover.js";
import { largestSide, windowOf } from "./crop.js";
import { InputError } from "./errors.js";
import { overlap, ownPixels } from "./square.js";

const CELLS = 32; // across a square of the network's size
const MARGIN = 8; // of a square's side stays free around thin parts, where the picture has it: 1/8
const THIN = 4; // thin is what is at most 1/4 of the network's side thick
const COMPACT = 4; // a region at most so many times as long as thick is filled in one square
const SCALES = [1, 1.5, 2]; // sides of squares for thin parts, in network's sides; the next where there are too many
const NEARLY = 1.25; // a picture of at most so many network's sides is one square
const UNKNOWN = 0.6; // a square of which more is unknown waits for the squares around it

/** @typedef {import("./cells.js").Grid} Grid */
/** @typedef {import("./crop.js").Rect} Rect */
/** @typedef {import("./square.js").Square} Square */
/** @typedef {import("./cover.js").Regions} Regions */

/**
 * Squares that fill all of the mask, in the order to fill them in: first what has the most known surroundings.
 * @param {Grid} mask not empty
 * @param {number} size the network's side
 * @param {number} [limit] the most squares
 * @returns {Square[]}
 * @throws {InputError} more squares are needed
 */
export function findSquares(mask, size, limit = Infinity) {
  const finder = new Finder(mask, size);
  let count = 0;
  for (const scale of SCALES) {
    count = finder.find(scale);
    if (count <= limit) return finder.squares();
  }
  throw new InputError(
    `the mask needs ${count} squares of the network, more than the limit of ${limit}; raise the limit (max_squares), ` +
      "mark less, or shrink the picture",
  );
}

const NOWHERE = { left: 0, top: 0, side: 0 }; // the crop of a piece that is not placed yet

/** The search for squares in one mask. */
class Finder {
  /** @param {Grid} mask @param {number} size */
  constructor(mask, size) {
    this.mask = mask;
    this.largest = largestSide(mask, size);
    this.base = Math.min(size, this.largest); // the side at scale 1
    this.cell = Math.max(1, Math.floor(this.base / CELLS));
    this.count = coverage(mask, this.cell);
    const { data, height, width } = this.count;
    this.height = height;
    this.width = width;
    /** @type {Grid} */
    this.marked = { data: Uint8Array.from(data, (value) => (value ? 1 : 0)), height, width };
    /** Pixels of each cell. */
    this.pixels = data.map((_, place) => {
      return this._length(place % width, mask.width) * this._length(Math.floor(place / width), mask.height);
    });
    this.todo = this.marked; // cells without an owner
    /** @type {Square[]} */
    this.found = []; // of thick parts
    /** @type {Square[]} */
    this.thin = []; // of the rest; they all have one side, and their crops are placed at the end
    this.side = this.base;
  }

  /**
   * Shares out all cells; squares of thin parts are `scale` times the network's size.
   * @param {number} scale
   * @returns {number} how many squares there are
   */
  find(scale) {
    this.todo = { ...this.marked, data: this.marked.data.slice() };
    this.found = [];
    this._findThick(scale);
    this._findThin(scale);
    return this.found.length + this.thin.length;
  }

  /** What `find` found, in the order to fill them in. */
  squares() {
    return this._ordered([...this.found, ...this.thin.map((piece) => this._placed(piece, this.side))]);
  }

  /** Pixels of a cell along an axis of a picture. @param {number} index @param {number} length */
  _length(index, length) {
    return Math.min(this.cell, length - index * this.cell);
  }

  // --- thick parts --------------------------------------------------------------------------------------------

  /** @param {number} scale */
  _findThick(scale) {
    const solid = { ...this.marked, data: this.marked.data.map((_, i) => Number(2 * this.count.data[i] >= this.pixels[i])) };
    const thinnest = Math.floor(Math.floor(this.base / THIN) / this.cell) + 1; // side of a solid square of a thick part
    const seeds = eroded(solid, thinnest);
    if (!seeds.data.includes(1)) return;
    const { numbers, boxes } = components(this.marked);
    const thick = new Set();
    eachOne(seeds, 0, 0, this.width, (place) => thick.add(numbers[place]));
    thick.delete(0);
    for (const number of [...thick].sort((a, b) => a - b)) {
      const box = boxes[number];
      this._findThickRegion(box, part(numbered(this.marked, numbers, number), box), part(solid, box), thinnest, scale);
    }
    // What is left over at the end of a long region may be thin. It is given back, to share a square.
    this.found = this.found.filter((square) => {
      if (thickness(square.cells) >= thinnest) return true;
      eachOne(square.cells, square.top, square.left, this.width, (place) => (this.todo.data[place] = 1));
      return false;
    });
  }

  /**
   * Takes the thick parts out of a connected region, thickest first.
   * @param {Rect} view the region's box
   * @param {Grid} region of the box
   * @param {Grid} solid of the box
   * @param {number} thinnest
   * @param {number} scale
   */
  _findThickRegion(view, region, solid, thinnest, scale) {
    for (;;) {
      const left = both(both(region, solid), part(this.todo, view));
      const thick = thickness(left);
      if (thick < thinnest) return;
      // Bumps and tails of less than a quarter of the thickness are not part of the core.
      const reach = Math.max(thinnest, Math.floor(thick / 4));
      const cores = opened(left, reach);
      const { numbers, boxes } = components(cores);
      for (const [number, box] of boxes.entries()) {
        if (!number) continue;
        const core = numbered(cores, numbers, number);
        const across = thickness(part(core, box));
        if (Math.max(box.bottom - box.top, box.right - box.left) <= COMPACT * across) {
          const near = {
            top: Math.max(0, box.top - reach),
            left: Math.max(0, box.left - reach),
            bottom: Math.min(region.height, box.bottom + reach),
            right: Math.min(region.width, box.right + reach),
          };
          this._own(shifted(near, view), part(region, near), across);
          continue;
        }
        const seeds = empty(this.height, this.width);
        const wanted = both(both(dilated(core, reach), region), part(this.todo, view));
        eachOne(wanted, view.top, view.left, this.width, (place) => (seeds.data[place] = 1));
        const { side, margin } = this._tile(across, scale);
        for (const rect of covered(seeds, side, margin)) {
          for (let y = rect.top; y < rect.bottom; y++) {
            seeds.data.fill(0, y * this.width + rect.left, y * this.width + rect.right);
          }
          const inner = clipped(rect, view);
          this._own(shifted(inner, view), part(region, inner), across, side * this.cell);
        }
      }
    }
  }

  /**
   * Side and margin, in cells, of the squares along a region `across` cells thick. What a square owns is about twice as
   * long as the region is thick, unless the square would be over twice the network's size; the margins are together as
   * wide as the region.
   * @param {number} across
   * @param {number} scale
   */
  _tile(across, scale) {
    const { base, cell } = this;
    const thick = (across + 2) * cell; // it may fill some of a cell on either side
    const longest = Math.max(2 * thick, Math.trunc(scale * (base - Math.floor(base / THIN))));
    const own = Math.max(thick, Math.min(longest, 2 * base - thick));
    const margin = Math.ceil(Math.max(thick, Math.floor(base / THIN)) / 2 / cell);
    return { side: Math.ceil(own / cell) + 2 * margin, margin };
  }

  /**
   * Adds a square that owns what has no owner yet of a region in a rectangle of the picture's cells.
   * @param {Rect} rect
   * @param {Grid} region
   * @param {number} across thickness in cells
   * @param {number} [largest] bounds its side, in pixels: at the picture's edge a square may own more than inside
   */
  _own(rect, region, across, largest = Infinity) {
    const cells = both(region, part(this.todo, rect));
    if (!cells.data.includes(1)) return;
    const piece = this._taken(rect, cells);
    const { top, left, bottom, right } = this._extent(piece);
    const [long, short] = [Math.max(bottom - top, right - left), Math.min(bottom - top, right - left)];
    const room = Math.max(Math.min((across + 2) * this.cell, short), Math.floor(this.base / THIN));
    this.found.push(this._placed(piece, Math.min(long + room, largest)));
  }

  // --- specks and thin parts ----------------------------------------------------------------------------------

  /** @param {number} scale */
  _findThin(scale) {
    const longest = Math.min(Math.max(this.mask.height, this.mask.width), this.largest);
    const nearly = longest <= NEARLY * this.base;
    const side = nearly ? longest : Math.min(Math.max(this.base, Math.trunc(scale * this.base)), longest);
    const [round, margin] = [Math.ceil(side / this.cell), Math.ceil(Math.ceil(side / MARGIN) / this.cell)];
    // Rounded up it would seem to reach both edges of the picture, where no margin is left.
    const seems = [this.mask.height, this.mask.width].some((length) => side < length && length <= round * this.cell);
    const cells = seems ? round - 1 : round;
    const own = cells - 2 * margin;
    const { numbers, boxes } = components(this.todo);
    // A region that fits is given to one square as a whole; a larger one may be cut at any cell.
    const fits = boxes.map((box) => Math.max(box.bottom - box.top, box.right - box.left) <= own);
    const regions = { numbers, boxes, fits };
    this.found = this.found.map((square) => {
      if (square.crop.side > 2 * this.base) return square;
      const rect = this._inset(square.crop);
      const whole = this._whole(rect, regions);
      return whole.data.includes(1) ? this._joined(square, this._taken(rect, whole)) : square;
    });
    const pieces = [];
    for (const rect of covered(this.todo, cells, margin, regions)) {
      pieces.push(this._taken(rect, this._whole(rect, regions)));
    }
    this.thin = this._merged(pieces, own);
    this.side = side;
  }

  /**
   * The cells of a rectangle without an owner, less those of regions that fit a square but are cut here.
   * @param {Rect} rect
   * @param {Regions} regions
   * @returns {Grid}
   */
  _whole(rect, { numbers, boxes, fits }) {
    const cells = part(this.todo, rect);
    for (let y = 0, i = 0; y < cells.height; y++) {
      for (let x = 0; x < cells.width; x++, i++) {
        const number = numbers[(rect.top + y) * this.width + rect.left + x];
        const box = boxes[number];
        const cut = box.top < rect.top || box.left < rect.left || box.bottom > rect.bottom || box.right > rect.right;
        if (cut && fits[number]) cells.data[i] = 0;
      }
    }
    return cells;
  }

  /**
   * The cells of a crop that leave the margin to its sides, those at the picture's edges excepted.
   * @param {import("./crop.js").Crop} crop
   * @returns {Rect}
   */
  _inset(crop) {
    const margin = Math.floor(crop.side / MARGIN);
    const { top, left, bottom, right } = windowOf(crop, this.mask);
    /** @param {number} start @param {number} stop @param {number} length */
    const along = (start, stop, length) => {
      const first = start === 0 ? 0 : Math.ceil((start + margin) / this.cell);
      const last = stop === length ? Math.ceil(length / this.cell) : Math.floor((stop - margin) / this.cell);
      return [first, Math.max(first, last)];
    };
    const [rows, columns] = [along(top, bottom, this.mask.height), along(left, right, this.mask.width)];
    return { top: rows[0], left: columns[0], bottom: rows[1], right: columns[1] };
  }

  /**
   * Joins pieces, in order, that together are at most `own` cells wide and high.
   * @param {Square[]} pieces
   * @param {number} own
   */
  _merged(pieces, own) {
    const kept = pieces.slice();
    for (let index = 0; index < kept.length; index++) {
      for (let other = index + 1; other < kept.length; ) {
        const box = union(rectOf(kept[index]), rectOf(kept[other]));
        if (Math.max(box.bottom - box.top, box.right - box.left) <= own) {
          kept[index] = this._joined(kept[index], kept[other]);
          kept.splice(other, 1);
          other = index + 1;
        } else other++;
      }
    }
    return kept;
  }

  // --- squares from cells -------------------------------------------------------------------------------------

  /**
   * A piece of those cells, which have an owner now, cut to their bounding box; its crop is not placed yet.
   * @param {Rect} rect
   * @param {Grid} cells
   * @returns {Square}
   */
  _taken(rect, cells) {
    eachOne(cells, rect.top, rect.left, this.width, (place) => (this.todo.data[place] = 0));
    const box = boundingBox(cells);
    if (!box) throw new Error("a square owns no cell");
    return { crop: NOWHERE, cell: this.cell, top: rect.top + box.top, left: rect.left + box.left, cells: part(cells, box) };
  }

  /** One square with the cells of another piece. @param {Square} one @param {Square} other @returns {Square} */
  _joined(one, other) {
    const { top, left, bottom, right } = union(rectOf(one), rectOf(other));
    const cells = empty(bottom - top, right - left);
    for (const piece of [one, other]) {
      eachOne(piece.cells, piece.top - top, piece.left - left, cells.width, (place) => (cells.data[place] = 1));
    }
    return { crop: one.crop, cell: this.cell, top, left, cells };
  }

  /** The bounding box of the mask's pixels in a piece's cells. @param {Square} piece @returns {Rect} */
  _extent(piece) {
    const { top, left, cells } = piece;
    const side = Math.max(cells.height, cells.width) * this.cell;
    const crop = { left: left * this.cell, top: top * this.cell, side };
    const box = boundingBox(ownPixels({ ...piece, crop }, this.mask));
    if (!box) throw new Error("a square owns no pixel of the mask");
    return {
      top: crop.top + box.top,
      left: crop.left + box.left,
      bottom: crop.top + box.bottom,
      right: crop.left + box.right,
    };
  }

  /**
   * The piece with a crop around its pixels, moved into the picture where that has room.
   * @param {Square} piece
   * @param {number} wanted side
   * @returns {Square}
   */
  _placed(piece, wanted) {
    const side = Math.min(Math.max(wanted, this.base), Math.max(this.base, this.largest));
    const { top, left, bottom, right } = this._extent(piece);
    /** @param {number} low @param {number} high @param {number} length */
    const along = (low, high, length) => {
      const room = length - side; // below 0 where the square is larger than the picture
      return room < 0 ? Math.floor(room / 2) : Math.min(Math.max(0, Math.floor((low + high - side) / 2)), room);
    };
    const crop = { left: along(left, right, this.mask.width), top: along(top, bottom, this.mask.height), side };
    return { ...piece, crop };
  }

  // --- order --------------------------------------------------------------------------------------------------

  /**
   * The squares run by run. In a run no two share a pixel of the picture, and what is best known is first: squares are
   * taken by the share of their window that is still unknown. One of which more than `UNKNOWN` is unknown waits, unless
   * no other has less, so that large parts are filled from their borders.
   * @param {Square[]} squares
   */
  _ordered(squares) {
    const windows = squares.map(({ crop }) => windowOf(crop, this.mask));
    const unknown = this.count.data.slice();
    const share = windows.map((window) => this._share(unknown, window));
    const waiting = new Set(squares.keys());
    /** @type {Square[]} */
    const order = [];
    while (waiting.size) {
      const most = Math.max(UNKNOWN, Math.min(...[...waiting].map((index) => share[index])));
      const candidates = [...waiting]
        .filter((index) => share[index] <= most)
        .sort((a, b) => {
          const [one, other] = [windows[a], windows[b]];
          return share[a] - share[b] || one.top - other.top || one.left - other.left || a - b;
        });
      const near = new Set();
      for (const index of candidates) {
        if (near.has(index)) continue;
        windows.forEach((window, other) => overlap(windows[index], window) && near.add(other));
        waiting.delete(index);
        const square = squares[index];
        order.push(square);
        eachOne(square.cells, square.top, square.left, this.width, (place) => (unknown[place] = 0));
      }
      for (const index of waiting) if (near.has(index)) share[index] = this._share(unknown, windows[index]);
    }
    return order;
  }

  /** The unknown share of the cells of a window. @param {Int32Array} unknown @param {Rect} window */
  _share(unknown, { top, left, bottom, right }) {
    let [missing, all] = [0, 0];
    for (let y = Math.floor(top / this.cell); y < Math.ceil(bottom / this.cell); y++) {
      for (let x = Math.floor(left / this.cell); x < Math.ceil(right / this.cell); x++) {
        missing += unknown[y * this.width + x];
        all += this.pixels[y * this.width + x];
      }
    }
    return missing / all;
  }
}

/** The rectangle of a piece in the picture's cells. @param {Square} piece @returns {Rect} */
function rectOf({ top, left, cells }) {
  return { top, left, bottom: top + cells.height, right: left + cells.width };
}
