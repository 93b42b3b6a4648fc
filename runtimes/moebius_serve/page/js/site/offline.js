// The service worker of a site: keeps the page's files, so that it opens offline after the first visit. The export puts
// `self.SITE`, the version and the files with their SHA-256, before this text and places it at the site's root.

const scope = /** @type {any} */ (self);
const { version, files } = /** @type {{version: string, files: Record<string, string>}} */ (scope.SITE);
const NAME = `moebius-page-${version}`;

/** Fetches a file, and refuses one of another version. @param {Cache} cache @param {string} path @param {string} sha256 */
async function keep(cache, path, sha256) {
  const address = new URL(path, scope.registration.scope);
  const answer = await fetch(address, { cache: "no-cache" });
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  const data = await answer.arrayBuffer();
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
  const hex = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (hex !== sha256) throw new Error(`${path} is not the file of this version`);
  // With these headers from here, threads work on hosts that cannot send them, from the second visit on.
  const headers = new Headers({
    "content-type": answer.headers.get("content-type") ?? "application/octet-stream",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-embedder-policy": "require-corp",
    "cross-origin-resource-policy": "same-origin",
  });
  await cache.put(address, new Response(data, { headers }));
}

scope.addEventListener("install", (/** @type {any} */ event) => {
  const all = async () => {
    await caches.delete(NAME);
    const cache = await caches.open(NAME);
    try {
      for (const [path, sha256] of Object.entries(files)) await keep(cache, path, sha256);
    } catch (error) {
      await caches.delete(NAME); // whole or not at all
      throw error;
    }
  };
  event.waitUntil(all());
});

scope.addEventListener("activate", (/** @type {any} */ event) => {
  const tidy = async () => {
    const old = (await caches.keys()).filter((name) => name.startsWith("moebius-page-") && name !== NAME);
    await Promise.all(old.map((name) => caches.delete(name)));
  };
  event.waitUntil(tidy());
});

scope.addEventListener("fetch", (/** @type {any} */ event) => {
  const address = new URL(event.request.url);
  const root = new URL(scope.registration.scope);
  if (event.request.method !== "GET" || address.origin !== root.origin) return;
  const path = address.pathname.slice(root.pathname.length) || "index.html";
  if (!(path in files)) return;
  const answer = async () => {
    const kept = await (await caches.open(NAME)).match(new URL(path, root));
    return kept ?? fetch(event.request);
  };
  event.respondWith(answer());
});
