// The settings: what the fields say as options of the engine, and what the engine says of itself.

import { must } from "./mask.js";

/** @param {string} id @returns {any} */
const $ = (id) => must(document.getElementById(id));

/** The options of a run; what a field leaves open is absent, and the engine's default holds. */
export function options() {
  /** @param {string} id */
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  const grow = $("dilate").value.trim();
  return {
    mode: $("mode").value || undefined,
    steps: number("steps"),
    guidance_scale: number("guidance"),
    seed: number("seed") ?? 0,
    blend: $("blend").value || undefined,
    mask_dilate: grow === "" ? undefined : grow === "auto" ? "auto" : Number(grow),
  };
}

/** Fills the fields with an engine's modes and defaults, and the "about" list. @param {any} facts of `describe` */
export function show(facts) {
  for (const mode of facts.modes) {
    const option = document.createElement("option");
    option.value = option.textContent = mode;
    $("mode").append(option);
  }
  $("mode").value = facts.mode;
  const showSteps = () => {
    $("steps").placeholder = String(facts.mode_steps?.[$("mode").value] ?? facts.defaults.num_inference_steps);
  };
  showSteps();
  $("mode").addEventListener("change", showSteps);
  $("guidance").placeholder = String(facts.defaults.guidance_scale);
  document.querySelector("[data-tool=select]")?.toggleAttribute("hidden", !facts.segmenter);
  showFacts(facts);
}

/** Fills the "about" list. @param {any} facts of `describe` */
export function showFacts(facts) {
  const rows = { model: facts.model, ...facts.runtime, weights: facts.test_weights ? "random test weights" : "trained" };
  $("facts").replaceChildren(
    ...Object.entries(rows).flatMap(([name, value]) => {
      const term = document.createElement("dt");
      const text = document.createElement("dd");
      term.textContent = name;
      text.textContent = String(value);
      return [term, text];
    }),
  );
}
