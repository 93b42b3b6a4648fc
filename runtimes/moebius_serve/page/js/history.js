// Undo and redo without limit, of strokes and of results alike.

/** @typedef {{undo: () => unknown, redo: () => unknown}} Change either may return a promise */

export class History {
  /** @param {() => void} changed called before and after every change */
  constructor(changed) {
    /** @type {Change[]} */
    this.done = [];
    /** @type {Change[]} */
    this.undone = [];
    this.waiting = 0;
    /** @type {Promise<unknown>} */
    this.last = Promise.resolve();
    this.changed = changed;
  }

  /** Whether a change is on its way. */
  get busy() {
    return this.waiting > 0;
  }

  /** A change that has been made. @param {Change} change */
  push(change) {
    this.done.push(change);
    this.undone = [];
    this.changed();
  }

  undo() {
    return this.#queue("undo", this.done, this.undone);
  }

  redo() {
    return this.#queue("redo", this.undone, this.done);
  }

  clear() {
    this.done = [];
    this.undone = [];
    this.changed();
  }

  /** One change at a time, each in its turn. @param {"undo" | "redo"} way @param {Change[]} from @param {Change[]} to */
  #queue(way, from, to) {
    this.waiting += 1;
    const moved = this.last.then(async () => {
      try {
        const change = from[from.length - 1];
        if (!change) return;
        await change[way]();
        from.pop();
        to.push(change);
      } finally {
        this.waiting -= 1;
        this.changed();
      }
    });
    this.last = moved.catch(() => {});
    this.changed();
    return moved;
  }
}
