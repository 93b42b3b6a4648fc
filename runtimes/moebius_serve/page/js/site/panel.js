// What only a site has: how much of the model is stored, a download before the first picture, and offline use.

import { must } from "../mask.js";
import { megabytes } from "./storage.js";

/** @param {string} id @returns {any} */
const $ = (id) => must(document.getElementById(id));

/**
 * @param {import("./engine.js").SiteEngine} engine
 * @param {{progress: (now: import("../server.js").Progress) => void, fail: (error: unknown) => void,
 *   done: (words: string) => void}} page
 */
export function showStorage(engine, page) {
  const refresh = async () => {
    const { stored, total } = await engine.stored();
    $("stored").textContent = `${megabytes(stored)} of ${megabytes(total)} are stored in this browser.`;
    $("storage").dataset.stored = String(stored);
    $("model-download").disabled = stored === total;
    $("model-clear").disabled = stored === 0;
  };
  const download = async () => {
    await engine.download(page.progress);
    page.done("The model is stored. This page works offline now.");
  };
  const guarded = (/** @type {() => Promise<void>} */ action) => async () => {
    $("model-download").disabled = $("model-clear").disabled = true;
    try {
      await action();
    } catch (error) {
      page.fail(error);
    }
    await refresh().catch(page.fail);
  };
  $("storage").hidden = false;
  $("model-download").addEventListener("click", guarded(download));
  $("model-clear").addEventListener("click", guarded(() => engine.clear()));
  void offline(engine.root);
  refresh().catch(page.fail);
  return () => void refresh().catch(() => undefined);
}

/** Registers the service worker. Without one the page works, online only. @param {URL} root */
async function offline(root) {
  if (!("serviceWorker" in navigator)) return;
  try {
    await navigator.serviceWorker.register(new URL("offline.js", root), { scope: root.pathname });
    await navigator.serviceWorker.ready;
    document.body.dataset.offline = "yes";
  } catch {
    document.body.dataset.offline = "no";
  }
}
