// What survives a reload: the picture, its mask and its name, and the result that can be downloaded, in this browser's own storage.

const DATABASE = "moebius-edge";
const KEY = "work";

/** @typedef {{blob: Blob, name: string, format: string, mask: Blob, result: {file: Blob, name: string} | null}} Work */

/** @returns {Promise<IDBDatabase>} */
function database() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(DATABASE, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(KEY);
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/**
 * @template T
 * @param {IDBTransactionMode} mode
 * @param {(store: IDBObjectStore) => IDBRequest<T>} use
 * @returns {Promise<T>}
 */
async function run(mode, use) {
  const open = await database();
  try {
    return await new Promise((resolve, reject) => {
      const request = use(open.transaction(KEY, mode).objectStore(KEY));
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => reject(request.error);
    });
  } finally {
    open.close();
  }
}

/** Keeps the work; a browser without storage (private windows) simply keeps nothing. @param {Work} work */
export async function keep(work) {
  try {
    await run("readwrite", (store) => store.put(work, KEY));
  } catch {
    // Nothing is lost but the convenience.
  }
}

/** @returns {Promise<Work | null>} what was kept */
export async function kept() {
  try {
    return (await run("readonly", (store) => store.get(KEY))) ?? null;
  } catch {
    return null;
  }
}
