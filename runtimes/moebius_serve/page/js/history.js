// Undo and redo without limit, of strokes and of results alike.

/** @typedef {{undo: () => unknown, redo: () => unknown}} Change either may return a promise */

export class History {
  /** @param {() => void} changed called after every change */
  constructor(changed) {
    /** @type {Change[]} */
    this.done = [];
    /** @type {Change[]} */
    this.undone = [];
    this.busy = false;
    this.changed = changed;
  }

  /** A change that has been made. @param {Change} change */
  push(change) {
    this.done.push(change);
    this.undone = [];
    this.changed();
  }

  async undo() {
    await this.#move("undo", this.done, this.undone);
  }

  async redo() {
    await this.#move("redo", this.undone, this.done);
  }

  clear() {
    this.done = [];
    this.undone = [];
    this.changed();
  }

  /** One change at a time: a call during another does nothing. @param {"undo" | "redo"} way @param {Change[]} from @param {Change[]} to */
  async #move(way, from, to) {
    const change = from[from.length - 1];
    if (!change || this.busy) return;
    this.busy = true;
    try {
      await change[way]();
      from.pop();
      to.push(change);
    } finally {
      this.busy = false;
    }
    this.changed();
  }
}
