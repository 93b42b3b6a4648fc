// What only a site has: how much of the model is stored, a download before the first picture, and offline use.

import { must } from "../mask.js";
import { chosen } from "./engine.js";
import { megabytes } from "./storage.js";

/** @param {string} id @returns {any} */
const $ = (id) => must(document.getElementById(id));

/**
 * @param {import("./engine.js").SiteEngine} engine
 * @param {{progress: (now: import("../server.js").Progress) => void, fail: (error: unknown) => void,
 *   done: (words: string) => void, about: (facts: any) => void}} page
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
  $("provider").value = chosen();
  $("provider").addEventListener("change", () => {
    engine.runOn($("provider").value).then(page.about).catch(page.fail);
  });
  void offline(engine.root);
  refresh().catch(page.fail);
  return () => void refresh().catch(() => undefined);
}

/** Registers the service worker. Without one the page works, online only. @param {URL} root */
async function offline(root) {
  document.body.dataset.offline = (await registered(root).catch(() => false)) ? "yes" : "no";
}

/** Whether a service worker serves this page's files, once it is installed or has failed. @param {URL} root */
async function registered(root) {
  if (!("serviceWorker" in navigator)) return false;
  const registration = await navigator.serviceWorker.register(new URL("offline.js", root), { scope: root.pathname });
  const { installing, waiting, active } = registration;
  const worker = installing ?? waiting;
  if (!worker || active) return active !== null; // an older version serves until the page is closed
  return new Promise((resolve) => {
    const look = () => {
      if (worker.state === "activated" || worker.state === "redundant") resolve(worker.state === "activated");
    };
    worker.addEventListener("statechange", look);
    look();
  });
}
