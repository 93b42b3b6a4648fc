// Undo and redo without limit, of strokes and of results alike.

/** @typedef {{undo: () => void, redo: () => void}} Change */

export class History {
  /** @param {() => void} changed called after every change */
  constructor(changed) {
    /** @type {Change[]} */
    this.done = [];
    /** @type {Change[]} */
    this.undone = [];
    this.changed = changed;
  }

  /** A change that has been made. @param {Change} change */
  push(change) {
    this.done.push(change);
    this.undone = [];
    this.changed();
  }

  undo() {
    const change = this.done.pop();
    if (!change) return;
    change.undo();
    this.undone.push(change);
    this.changed();
  }

  redo() {
    const change = this.undone.pop();
    if (!change) return;
    change.redo();
    this.done.push(change);
    this.changed();
  }

  clear() {
    this.done = [];
    this.undone = [];
    this.changed();
  }
}
