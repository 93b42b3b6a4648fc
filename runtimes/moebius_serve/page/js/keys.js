// The keyboard: one key an action; what is typed into a field stays there.

/** @typedef {import("./stage.js").Stage} Stage */

/**
 * @typedef {object} Actions
 * @property {Record<string, () => unknown>} keys by `KeyboardEvent.key`, letters in lower case
 * @property {(held: boolean) => unknown} undo
 * @property {(held: boolean) => unknown} redo
 * @property {() => void} released the key that compares
 */

const STEPS = { ArrowLeft: [-10, 0], ArrowRight: [10, 0], ArrowUp: [0, -10], ArrowDown: [0, 10] };

/** @param {Stage} stage @param {Actions} actions */
export function listen(stage, { keys, undo, redo, released }) {
  document.addEventListener("keydown", (event) => {
    const target = /** @type {HTMLElement} */ (event.target);
    const typing = target.matches("input:not([type=range]):not([type=checkbox]), select, textarea");
    if (document.querySelector("dialog[open]") || typing) return;
    if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z") {
      event.preventDefault();
      void (event.shiftKey ? redo : undo)(event.repeat);
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const onButton = target.matches("button, summary, a, label, input");
    if (onButton && (event.key === "Enter" || event.key === " ")) return; // the button's own
    const step = STEPS[/** @type {keyof typeof STEPS} */ (event.key)];
    if (step && target === stage.root) {
      event.preventDefault();
      const far = event.shiftKey ? 5 : 1;
      stage.nudge(step[0] * far, step[1] * far);
      return;
    }
    const action = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action || (event.repeat && event.key === "c")) return;
    event.preventDefault();
    void action();
  });
  document.addEventListener("keyup", (event) => {
    if (event.key === " ") stage.space = false;
    if (event.key.toLowerCase() === "c") released();
  });
}
