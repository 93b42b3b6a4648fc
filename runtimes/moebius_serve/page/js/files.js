// Files: chosen by a button, dropped, pasted, and saved.

/** @typedef {(file: Blob, name: string) => Promise<unknown>} Use */

/**
 * Calls `use` with each file that a file input gets.
 * @param {HTMLInputElement} input @param {Use} use @param {(error: unknown) => void} fail
 */
export function onFile(input, use, fail) {
  input.addEventListener("change", async () => {
    const file = input.files?.[0];
    if (!file) return;
    input.value = ""; // so that the same file can be chosen again
    await use(file, file.name).catch(fail);
  });
}

/**
 * Calls `use` with a file that is dropped on an element.
 * @param {HTMLElement} element @param {Use} use
 */
export function onDrop(element, use) {
  element.addEventListener("dragover", (event) => {
    event.preventDefault();
    element.classList.add("drop");
  });
  element.addEventListener("dragleave", () => element.classList.remove("drop"));
  element.addEventListener("drop", (event) => {
    event.preventDefault();
    element.classList.remove("drop");
    const file = event.dataTransfer?.files[0];
    if (file) void use(file, file.name);
  });
}

/** Calls `use` with a picture that is pasted. @param {Use} use */
export function onPaste(use) {
  document.addEventListener("paste", (event) => {
    const file = event.clipboardData?.files[0];
    if (file) void use(file, file.name || "pasted.png");
  });
}

/** Downloads a file. @param {Blob} blob @param {string} name */
export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
