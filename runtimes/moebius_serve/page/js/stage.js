// The stage: the picture and its mask under one view (zoom and shift), and the pointer's gestures on it.

import { must, TILE } from "./mask.js";

/** @typedef {import("./mask.js").Mask} Mask */
/** @typedef {import("./mask.js").Point} Point */
/** @typedef {"brush" | "eraser" | "line" | "lasso" | "rectangle" | "pan" | "select"} Tool */

/**
 * @typedef {object} Handlers
 * @property {() => void} changed the mask's content changed; called once per stroke
 * @property {(point: Point) => void} clicked with the tool "select", in pixels of the picture
 */

const SHOWN = 0.5; // opacity of the mask

export class Stage {
  /** @param {HTMLElement} root @param {Handlers} handlers */
  constructor(root, handlers) {
    this.root = root;
    this.handlers = handlers;
    this.pictureCanvas = /** @type {HTMLCanvasElement} */ (root.querySelector("#picture"));
    this.overlay = /** @type {HTMLCanvasElement} */ (root.querySelector("#overlay"));
    this.pictureContext = must(this.pictureCanvas.getContext("2d"));
    this.context = must(this.overlay.getContext("2d"));
    /** @type {ImageBitmap | null} */
    this.picture = null;
    /** @type {ImageBitmap | null} */
    this.before = null;
    /** @type {Mask | null} */
    this.mask = null;
    /** @type {Tool} */
    this.tool = "brush";
    this.size = 40;
    this.scale = 1;
    this.offset = { x: 0, y: 0 };
    /** Share of the width that shows the picture before; 0: none. */
    this.split = 0;
    this.frozen = false;
    this.space = false;
    /** @type {Point | null} */
    this.cursor = null;
    /** @type {Point | null} */
    this.last = null;
    /** @type {Map<number, Point>} */
    this.pointers = new Map();
    /** @type {{kind: "stroke" | "pan" | "pinch" | "area", points: Point[], from: Point, distance: number} | null} */
    this.gesture = null;
    this.waiting = { picture: false, overlay: false };
    new ResizeObserver(() => this.resize()).observe(root);
    root.addEventListener("pointerdown", (event) => this.#down(event));
    root.addEventListener("pointermove", (event) => this.#move(event));
    root.addEventListener("pointerup", (event) => this.#up(event));
    root.addEventListener("pointercancel", (event) => this.#up(event));
    root.addEventListener("pointerleave", () => this.#leave());
    root.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
  }

  /** Shows a picture with its mask. @param {ImageBitmap} picture @param {Mask} mask @param {boolean} fit */
  show(picture, mask, fit) {
    this.picture = picture;
    this.mask = mask;
    mask.unfold();
    if (fit) this.fit();
    else this.draw("both");
  }

  fit() {
    if (!this.picture) return;
    const { width, height } = this.#size();
    this.scale = Math.min(width / this.picture.width, height / this.picture.height, 8) * 0.98;
    this.offset = {
      x: (width - this.picture.width * this.scale) / 2,
      y: (height - this.picture.height * this.scale) / 2,
    };
    this.draw("both");
  }

  /** @param {number} factor @param {Point} [at] of the stage; its middle where none is given */
  zoom(factor, at) {
    const { width, height } = this.#size();
    const centre = at ?? { x: width / 2, y: height / 2 };
    const scale = Math.min(64, Math.max(0.01, this.scale * factor));
    const ratio = scale / this.scale;
    this.offset = {
      x: centre.x - (centre.x - this.offset.x) * ratio,
      y: centre.y - (centre.y - this.offset.y) * ratio,
    };
    this.scale = scale;
    this.draw("both");
  }

  resize() {
    const { width, height } = this.#size();
    for (const canvas of [this.pictureCanvas, this.overlay]) {
      canvas.width = Math.max(1, Math.round(width * devicePixelRatio));
      canvas.height = Math.max(1, Math.round(height * devicePixelRatio));
    }
    this.fit();
  }

  /** Redraws in the next frame. @param {"picture" | "overlay" | "both"} what */
  draw(what) {
    const idle = !this.waiting.picture && !this.waiting.overlay;
    if (what !== "overlay") this.waiting.picture = true;
    if (what !== "picture") this.waiting.overlay = true;
    if (idle) {
      requestAnimationFrame(() => {
        const { picture, overlay } = this.waiting;
        this.waiting = { picture: false, overlay: false };
        if (picture) this.#drawPicture();
        if (overlay) this.#drawOverlay();
      });
    }
  }

  /** Moves the keyboard's cursor, in pixels of the stage. @param {number} x @param {number} y */
  nudge(x, y) {
    if (!this.picture) return;
    const now = this.cursor ?? { x: this.picture.width / 2, y: this.picture.height / 2 };
    this.cursor = {
      x: Math.min(this.picture.width, Math.max(0, now.x + x / this.scale)),
      y: Math.min(this.picture.height, Math.max(0, now.y + y / this.scale)),
    };
    this.draw("overlay");
  }

  /** Paints one dab at the keyboard's cursor. */
  dab() {
    if (!this.mask || this.frozen) return;
    if (!this.cursor) this.nudge(0, 0);
    const at = /** @type {Point} */ (this.cursor);
    this.mask.begin();
    this.mask.line(at, at, this.size, this.tool === "eraser");
    this.handlers.changed();
    this.draw("overlay");
  }

  #size() {
    return { width: this.root.clientWidth, height: this.root.clientHeight };
  }

  /** @param {PointerEvent | WheelEvent} event @returns {Point} in pixels of the stage */
  #at(event) {
    const box = this.root.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  /** @param {Point} point of the stage @returns {Point} of the picture */
  #inPicture(point) {
    return { x: (point.x - this.offset.x) / this.scale, y: (point.y - this.offset.y) / this.scale };
  }

  /** @param {PointerEvent} event */
  #down(event) {
    if (!this.picture || !this.mask || (event.target instanceof HTMLInputElement)) return;
    this.root.focus({ preventScroll: true });
    this.root.setPointerCapture(event.pointerId);
    const at = this.#at(event);
    this.pointers.set(event.pointerId, at);
    if (this.pointers.size === 2) {
      this.#abandon();
      const [a, b] = [...this.pointers.values()];
      this.gesture = { kind: "pinch", points: [], from: middle(a, b), distance: distance(a, b) };
      return;
    }
    if (this.pointers.size > 2) return;
    if (event.button === 1 || this.space || this.tool === "pan") {
      this.gesture = { kind: "pan", points: [], from: at, distance: 0 };
      return;
    }
    if (event.button !== 0 || this.frozen) return;
    const point = this.#inPicture(at);
    if (this.tool === "select") {
      this.handlers.clicked(point);
      return;
    }
    this.mask.begin();
    if (this.tool === "lasso" || this.tool === "rectangle" || this.tool === "line") {
      this.gesture = { kind: "area", points: [point], from: point, distance: 0 };
      return;
    }
    const from = event.shiftKey && this.last ? this.last : point;
    this.mask.line(from, point, this.size, this.tool === "eraser");
    this.gesture = { kind: "stroke", points: [point], from: point, distance: 0 };
    this.last = point;
    this.draw("overlay");
  }

  /** @param {PointerEvent} event */
  #move(event) {
    const at = this.#at(event);
    this.cursor = this.#inPicture(at);
    if (this.pointers.has(event.pointerId)) this.pointers.set(event.pointerId, at);
    const gesture = this.gesture;
    if (gesture?.kind === "pan" && this.pointers.size) {
      this.offset = { x: this.offset.x + at.x - gesture.from.x, y: this.offset.y + at.y - gesture.from.y };
      gesture.from = at;
      this.draw("both");
    } else if (gesture?.kind === "pinch" && this.pointers.size === 2) {
      const [a, b] = [...this.pointers.values()];
      const centre = middle(a, b);
      this.offset = { x: this.offset.x + centre.x - gesture.from.x, y: this.offset.y + centre.y - gesture.from.y };
      this.zoom(distance(a, b) / Math.max(1, gesture.distance), centre);
      gesture.from = centre;
      gesture.distance = distance(a, b);
    } else if (gesture?.kind === "stroke" && this.mask) {
      const moves = event.getCoalescedEvents?.() ?? [];
      for (const move of moves.length ? moves : [event]) {
        const point = this.#inPicture(this.#at(move));
        this.mask.line(/** @type {Point} */ (this.last), point, this.size, this.tool === "eraser");
        this.last = point;
      }
    } else if (gesture?.kind === "area") {
      const point = this.#inPicture(at);
      if (this.tool === "lasso") gesture.points.push(point);
      else gesture.points[1] = point;
    }
    this.draw("overlay");
  }

  /** @param {PointerEvent} event */
  #up(event) {
    this.pointers.delete(event.pointerId);
    const gesture = this.gesture;
    if (!gesture || (gesture.kind === "pinch" && this.pointers.size)) return;
    this.gesture = null;
    if (gesture.kind === "area" && this.mask && event.type !== "pointercancel") {
      this.#area(gesture.points);
    }
    if (gesture.kind === "area" || gesture.kind === "stroke") this.handlers.changed();
    this.draw("overlay");
  }

  /** @param {Point[]} points */
  #area(points) {
    if (!this.mask || points.length < 2) return;
    const [a, b] = [points[0], points[points.length - 1]];
    if (this.tool === "line") this.mask.line(a, b, this.size, false);
    else if (this.tool === "lasso") this.mask.fill(points, false);
    else this.mask.fill([a, { x: b.x, y: a.y }, b, { x: a.x, y: b.y }], false);
    this.last = b;
  }

  /** Ends a stroke because it turned out to be a pinch. */
  #abandon() {
    if (this.gesture?.kind === "stroke" || this.gesture?.kind === "area") this.handlers.changed();
    this.gesture = null;
  }

  #leave() {
    if (!this.gesture) {
      this.cursor = null;
      this.draw("overlay");
    }
  }

  /** @param {WheelEvent} event */
  #wheel(event) {
    if (!this.picture) return;
    event.preventDefault();
    if (event.altKey) {
      this.root.dispatchEvent(new CustomEvent("brushsize", { detail: event.deltaY < 0 ? 1.15 : 1 / 1.15 }));
      return;
    }
    this.zoom(Math.exp(-Math.sign(event.deltaY) * Math.min(60, Math.abs(event.deltaY)) * 0.004), this.#at(event));
  }

  #drawPicture() {
    const context = this.pictureContext;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.pictureCanvas.width, this.pictureCanvas.height);
    if (!this.picture) return;
    this.#view(context);
    context.imageSmoothingEnabled = this.scale < 3;
    context.imageSmoothingQuality = "high";
    context.drawImage(this.picture, 0, 0);
    if (this.before && this.split > 0) {
      const edge = (this.#size().width * this.split - this.offset.x) / this.scale;
      context.save();
      context.beginPath();
      context.rect(-1, -1, edge + 1, this.picture.height + 2);
      context.clip();
      context.drawImage(this.before, 0, 0);
      context.restore();
      if (this.split < 1) {
        context.fillStyle = "#fff";
        context.fillRect(edge - 1 / this.scale, 0, 2 / this.scale, this.picture.height);
      }
    }
  }

  #drawOverlay() {
    const context = this.context;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.overlay.width, this.overlay.height);
    if (!this.picture || !this.mask) return;
    this.#view(context);
    if (this.split === 0) {
      context.save();
      context.beginPath();
      context.rect(0, 0, this.picture.width, this.picture.height);
      context.clip();
      context.globalAlpha = SHOWN;
      for (const { x, y, canvas } of this.mask.tiles.values()) context.drawImage(canvas, x * TILE, y * TILE);
      context.restore();
    }
    this.#drawShape(context);
    if (this.cursor && ["brush", "eraser", "line"].includes(this.tool) && !this.frozen) {
      for (const [style, width] of [["#000", 3], ["#fff", 1.5]]) {
        context.beginPath();
        context.arc(this.cursor.x, this.cursor.y, this.size / 2, 0, 2 * Math.PI);
        context.strokeStyle = String(style);
        context.lineWidth = Number(width) / this.scale;
        context.stroke();
      }
    }
  }

  /** The outline of a lasso, rectangle or line that is being drawn. @param {CanvasRenderingContext2D} context */
  #drawShape(context) {
    const points = this.gesture?.kind === "area" ? this.gesture.points : [];
    if (points.length < 2) return;
    const [a, b] = [points[0], points[points.length - 1]];
    context.beginPath();
    if (this.tool === "rectangle") context.rect(a.x, a.y, b.x - a.x, b.y - a.y);
    else points.forEach((p, i) => (i ? context.lineTo(p.x, p.y) : context.moveTo(p.x, p.y)));
    context.lineCap = "round";
    context.strokeStyle = "rgb(255 60 60 / 80%)";
    context.lineWidth = this.tool === "line" ? this.size : 2 / this.scale;
    context.stroke();
  }

  /** @param {CanvasRenderingContext2D} context */
  #view(context) {
    const ratio = devicePixelRatio;
    context.setTransform(this.scale * ratio, 0, 0, this.scale * ratio, this.offset.x * ratio, this.offset.y * ratio);
  }
}

/** @param {Point} a @param {Point} b @returns {Point} */
function middle(a, b) {
  return { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 };
}

/** @param {Point} a @param {Point} b */
function distance(a, b) {
  return Math.hypot(a.x - b.x, a.y - b.y);
}
