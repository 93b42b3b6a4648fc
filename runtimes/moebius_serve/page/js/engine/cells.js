// Operations on binary masks in cells: coverage, connected regions, thickness and morphology.
// As moebius_runtime.regions.cells. It runs in Node too.

/** @typedef {{data: Uint8Array, height: number, width: number}} Grid of 0 and 1, row by row */
/** @typedef {import("./crop.js").Rect} Rect */

/** @param {number} height @param {number} width @returns {Grid} zeros */
export function empty(height, width) {
  return { data: new Uint8Array(height * width), height, width };
}

/** The part of a grid in a rectangle, which is clipped to it. @param {Grid} grid @param {Rect} rect @returns {Grid} */
export function part(grid, rect) {
  const [bottom, right] = [Math.min(rect.bottom, grid.height), Math.min(rect.right, grid.width)];
  const found = empty(Math.max(0, bottom - rect.top), Math.max(0, right - rect.left));
  for (let y = 0; y < found.height; y++) {
    const start = (rect.top + y) * grid.width + rect.left;
    found.data.set(grid.data.subarray(start, start + found.width), y * found.width);
  }
  return found;
}

/**
 * Calls for every cell of a part that is 1: with its place in the whole grid.
 * @param {Grid} cells the part
 * @param {number} top
 * @param {number} left
 * @param {number} width of the whole
 * @param {(place: number) => void} change
 */
export function eachOne(cells, top, left, width, change) {
  for (let y = 0; y < cells.height; y++) {
    for (let x = 0; x < cells.width; x++) {
      if (cells.data[y * cells.width + x]) change((top + y) * width + left + x);
    }
  }
}

/** Where both are 1; both of one shape. @param {Grid} one @param {Grid} other @returns {Grid} */
export function both(one, other) {
  return { ...one, data: one.data.map((value, i) => value & other.data[i]) };
}

/** @param {Grid} grid @returns {Grid} */
function inverse(grid) {
  return { ...grid, data: grid.data.map((value) => 1 - value) };
}

/**
 * The bounding box of the ones, or null where there is none.
 * @param {Grid} grid
 * @returns {Rect | null}
 */
export function boundingBox({ data, height, width }) {
  let [top, left, bottom, right] = [height, width, 0, 0];
  for (let y = 0; y < height; y++) {
    const row = data.subarray(y * width, (y + 1) * width);
    const first = row.indexOf(1);
    if (first < 0) continue;
    top = Math.min(top, y);
    bottom = y + 1;
    left = Math.min(left, first);
    right = Math.max(right, row.lastIndexOf(1) + 1);
  }
  return bottom ? { top, left, bottom, right } : null;
}

/**
 * The number of ones in each cell of cell x cell pixels; the last row and column may be cut.
 * @param {Grid} mask
 * @param {number} cell
 * @returns {{data: Int32Array, height: number, width: number}}
 */
export function coverage({ data, height, width }, cell) {
  const [rows, columns] = [Math.ceil(height / cell), Math.ceil(width / cell)];
  const count = new Int32Array(rows * columns);
  for (let y = 0, i = 0; y < height; y++) {
    const row = Math.floor(y / cell) * columns;
    for (let x = 0; x < width; x++, i++) if (data[i]) count[row + Math.floor(x / cell)]++;
  }
  return { data: count, height: rows, width: columns };
}

/**
 * The 8-connected regions, numbered from 1 in the reading order of their first cells.
 * @param {Grid} cells
 * @returns {{numbers: Int32Array, boxes: Rect[]}} the number of each cell's region, 0 where there is none, and the
 *   regions' bounding boxes; box 0 is empty
 */
export function components({ data, height, width }) {
  const numbers = new Int32Array(data.length);
  /** @type {Rect[]} */
  const boxes = [{ top: 0, left: 0, bottom: 0, right: 0 }];
  const waiting = [];
  for (let place = 0; place < data.length; place++) {
    if (!data[place] || numbers[place]) continue;
    const number = boxes.length;
    const box = { top: height, left: width, bottom: 0, right: 0 };
    numbers[place] = number;
    waiting.push(place);
    for (let next = waiting.pop(); next !== undefined; next = waiting.pop()) {
      const [y, x] = [Math.floor(next / width), next % width];
      box.top = Math.min(box.top, y);
      box.left = Math.min(box.left, x);
      box.bottom = Math.max(box.bottom, y + 1);
      box.right = Math.max(box.right, x + 1);
      for (let row = Math.max(0, y - 1); row <= Math.min(height - 1, y + 1); row++) {
        for (let column = Math.max(0, x - 1); column <= Math.min(width - 1, x + 1); column++) {
          const near = row * width + column;
          if (data[near] && !numbers[near]) {
            numbers[near] = number;
            waiting.push(near);
          }
        }
      }
    }
    boxes.push(box);
  }
  return { numbers, boxes };
}

/**
 * Where a square of side x side ones begins.
 * @param {Grid} cells
 * @param {number} side
 * @returns {Grid} [h - side + 1, w - side + 1], maybe empty
 */
export function eroded({ data, height, width }, side) {
  const found = empty(Math.max(0, height - side + 1), Math.max(0, width - side + 1));
  if (!found.data.length) return found;
  const below = new Int32Array(found.width); // rows, from this one down, in which a line of `side` ones begins here
  for (let y = height - 1; y >= 0; y--) {
    let run = 0;
    for (let x = width - 1; x >= 0; x--) {
      run = data[y * width + x] ? run + 1 : 0;
      if (x >= found.width) continue;
      below[x] = run >= side ? below[x] + 1 : 0;
      if (y < found.height && below[x] >= side) found.data[y * found.width + x] = 1;
    }
  }
  return found;
}

/**
 * The cells that lie in some square of side x side ones (morphological opening).
 * @param {Grid} cells
 * @param {number} side
 * @returns {Grid} [h, w]
 */
export function opened(cells, side) {
  const corners = eroded(cells, side);
  const padded = empty(cells.height + side - 1, cells.width + side - 1);
  eachOne(corners, side - 1, side - 1, padded.width, (place) => (padded.data[place] = 1));
  return inverse(eroded(inverse(padded), side));
}

/**
 * The side of the largest square of ones, 0 where there is none.
 * @param {Grid} cells
 * @returns {number}
 */
export function thickness({ data, height, width }) {
  let largest = 0;
  const above = new Int32Array(width + 1); // the largest square that ends at each cell of the row above
  for (let y = 0; y < height; y++) {
    let corner = 0;
    for (let x = 0; x < width; x++) {
      const up = above[x + 1];
      above[x + 1] = data[y * width + x] ? Math.min(corner, up, above[x]) + 1 : 0;
      largest = Math.max(largest, above[x + 1]);
      corner = up;
    }
  }
  return largest;
}

/**
 * The cells within `reach` cells of a one, diagonally too.
 * @param {Grid} cells
 * @param {number} reach
 * @returns {Grid} [h, w]
 */
export function dilated(cells, reach) {
  const padded = empty(cells.height + 2 * reach, cells.width + 2 * reach);
  eachOne(cells, reach, reach, padded.width, (place) => (padded.data[place] = 1));
  return inverse(eroded(inverse(padded), 2 * reach + 1));
}
