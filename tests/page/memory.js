// A Cache Storage in memory.

/** @param {boolean} full it refuses to keep anything */
export function memory(full = false) {
  /** @type {Map<string, Uint8Array>} */
  const kept = new Map();
  const cache = {
    keys: async () => [...kept.keys()].map((url) => ({ url })),
    match: async (/** @type {string} */ url) => (kept.has(url) ? new Response(/** @type {any} */ (kept.get(url))) : undefined),
    delete: async (/** @type {string} */ url) => kept.delete(url),
    put: async (/** @type {string} */ url, /** @type {Response} */ answer) => {
      if (full) throw new DOMException("full", "QuotaExceededError");
      kept.set(url, new Uint8Array(await answer.arrayBuffer()));
    },
  };
  return { kept, open: async () => cache, delete: async () => kept.clear() };
}
