// Greedy cover of cells with squares of one size. As moebius_runtime.regions.cover. It runs in Node too.

/** @typedef {import("./cells.js").Grid} Grid */
/** @typedef {import("./crop.js").Rect} Rect */
/** @typedef {{numbers: Int32Array, boxes: Rect[], fits: boolean[]}} Regions of the seeds, and which must not be cut */

/**
 * Rectangles that cover all seeds: what a square of side x side cells owns inside its margins. The first seed in reading
 * order has to be inside, together with its region where that fits; sideways a rectangle takes the place that holds the
 * most seeds. The caller sets the seeds that it takes to 0 before the next rectangle is made; the first one must be
 * among them.
 * @param {Grid} seeds of the picture's cells
 * @param {number} side in cells
 * @param {number} margin in cells; there is none at the picture's edges
 * @param {Regions} [regions]
 * @returns {Generator<Rect, void, void>}
 */
export function* covered(seeds, side, margin, regions) {
  const { data, height, width } = seeds;
  for (let place = data.indexOf(1); place >= 0; place = data.indexOf(1, place)) {
    const [y, x] = [Math.floor(place / width), place % width];
    let box = { top: y, left: x, bottom: y + 1, right: x + 1 };
    if (regions && regions.fits[regions.numbers[place]]) box = regions.boxes[regions.numbers[place]];
    const rows = placements(box.top, box.bottom, height, side, margin);
    const [top, bottom] = rows[rows.length - 1];
    const columns = placements(box.left, box.right, width, side, margin);
    let [best, most] = [columns[0], -1];
    for (const [left, right] of columns) {
      let held = 0;
      for (let row = top; row < bottom; row++) {
        for (let column = left; column < right; column++) held += data[row * width + column];
      }
      if (held > most) [best, most] = [[left, right], held];
    }
    yield { top, left: best[0], bottom, right: best[1] };
  }
}

/**
 * What a window of `side` cells owns along an axis of `length` cells, wherever that holds low to high.
 * @param {number} low
 * @param {number} high
 * @param {number} length
 * @param {number} side
 * @param {number} margin
 * @returns {[number, number][]} first and last (exclusive) cell of each placement, both growing
 */
function placements(low, high, length, side, margin) {
  const room = Math.max(0, length - side);
  /** @type {[number, number][]} */
  const found = [];
  const last = Math.min(Math.max(0, low - margin), room);
  for (let start = Math.min(Math.max(0, high + margin - side), room); start <= last; start++) {
    found.push([start === 0 ? 0 : start + margin, start === room ? length : start + side - margin]);
  }
  return found;
}
