// The model's shards in this browser's Cache Storage, by hash: whole and checked, or not at all. It runs in Node too.

/** @typedef {{sha256: string, size: number}} Shard */
/** @typedef {{model: Shard[], data: Record<string, Shard[]>, nodes: number}} GraphFiles */
/** @typedef {{fetch: typeof fetch, caches: CacheStorage, subtle: SubtleCrypto, pause: (attempt: number) => Promise<void>}} Means */

export const CACHE = "moebius-shards";
const ATTEMPTS = 4;

/** An error whose message is meant for the person in front of the page. */
export class StorageError extends Error {}

/** @param {Shard} shard */
export const pathOf = (shard) => `shards/${shard.sha256}.bin`;

/** @param {number} bytes */
export const megabytes = (bytes) => `${(bytes / 1e6).toLocaleString("en", { maximumFractionDigits: bytes < 1e7 ? 1 : 0 })} MB`;

/** Every shard once. @param {GraphFiles} files @returns {Shard[]} */
export function shardsOf(files) {
  const every = [...files.model, ...Object.values(files.data).flat()];
  return [...new Map(every.map((shard) => [shard.sha256, shard])).values()];
}

/** All parts in one array. @param {Uint8Array[]} parts */
export function joined(parts) {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let place = 0;
  for (const part of parts) {
    whole.set(part, place);
    place += part.length;
  }
  return whole;
}

/** @returns {Means} the browser's own; `StorageError` where the page may not use them */
export function means() {
  if (!globalThis.caches || !globalThis.crypto?.subtle) {
    throw new StorageError("This browser keeps no files for this address: open the page over https, or on localhost.");
  }
  const pause = (/** @type {number} */ attempt) =>
    new Promise((/** @type {(value: void) => void} */ resolve) => setTimeout(resolve, 500 * 2 ** attempt));
  return { fetch: globalThis.fetch.bind(globalThis), caches, subtle: crypto.subtle, pause };
}

export class Storage {
  /** @param {URL} root of the site @param {Means} use */
  constructor(root, use = means()) {
    this.root = root;
    this.use = use;
    /** @type {Set<string>} shards whose content was checked since the page was opened */
    this.checked = new Set();
    /** @type {Map<string, Uint8Array[]>} what has come of a shard whose download was cut */
    this.begun = new Map();
  }

  /** Bytes of these shards that are stored. @param {Shard[]} shards */
  async stored(shards) {
    const cache = await this.use.caches.open(CACHE);
    const names = new Set((await cache.keys()).map((request) => new URL(request.url).pathname));
    const here = shards.filter((shard) => names.has(this.#address(shard).pathname));
    return here.reduce((sum, shard) => sum + shard.size, 0);
  }

  /** Removes every shard, those of older versions too. */
  async clear() {
    this.checked.clear();
    this.begun.clear();
    await this.use.caches.delete(CACHE);
  }

  /**
   * A shard's content: the stored one, or downloaded, checked and stored.
   * @param {Shard} shard
   * @param {(bytes: number) => void} onBytes the bytes that have come so far
   * @param {AbortSignal} [signal]
   * @returns {Promise<Uint8Array>}
   */
  async get(shard, onBytes = () => {}, signal) {
    const cache = await this.use.caches.open(CACHE);
    const address = this.#address(shard).href;
    const kept = await cache.match(address);
    if (kept) {
      const data = new Uint8Array(await kept.arrayBuffer());
      if (this.checked.has(shard.sha256) || (await this.#right(shard, data))) return data;
      await cache.delete(address); // damaged on the disk: it is downloaded again
    }
    const data = await this.#download(shard, onBytes, signal);
    try {
      await cache.put(address, new Response(data, { headers: { "content-type": "application/octet-stream" } }));
    } catch (error) {
      await cache.delete(address).catch(() => false);
      if (/** @type {any} */ (error)?.name !== "QuotaExceededError") throw error;
      throw new StorageError(
        `This browser has no room for the model (a part of ${megabytes(shard.size)} did not fit). Free some disk ` +
          "space, or clear what other sites store; then try again.",
      );
    }
    return data;
  }

  /** @param {Shard} shard */
  #address(shard) {
    return new URL(pathOf(shard), this.root);
  }

  /** @param {Shard} shard @param {Uint8Array<ArrayBuffer>} data */
  async #right(shard, data) {
    if (data.length !== shard.size) return false;
    const digest = new Uint8Array(await this.use.subtle.digest("SHA-256", data));
    const hex = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
    if (hex === shard.sha256) this.checked.add(shard.sha256);
    return hex === shard.sha256;
  }

  /** @param {Shard} shard @param {(bytes: number) => void} onBytes @param {AbortSignal} [signal] */
  async #download(shard, onBytes, signal) {
    /** @type {unknown} */
    let problem = null;
    let damaged = 0;
    for (let attempt = 0; attempt < ATTEMPTS && damaged < 2; attempt++) {
      if (attempt && !damaged) await this.use.pause(attempt);
      try {
        const data = await this.#receive(shard, damaged > 0, onBytes, signal);
        if (!data) continue;
        this.begun.delete(shard.sha256);
        if (await this.#right(shard, data)) return data;
        damaged++;
      } catch (error) {
        if (signal?.aborted || error instanceof StorageError) throw error;
        problem = error;
      }
    }
    if (damaged) {
      throw new StorageError(
        `A part of the model (${shard.sha256.slice(0, 12)}…) came damaged: its SHA-256 is not the site's. Nothing of it ` +
          "was kept. Try again; if it stays so, the site has to be uploaded again.",
      );
    }
    throw new StorageError(
      `The download of the model was cut (${problem instanceof Error ? problem.message : "the connection ended"}). ` +
        "What has come is kept; try again to go on from there.",
    );
  }

  /**
   * Receives a shard, from where an earlier try was cut. Null where the connection ended too early.
   * @param {Shard} shard @param {boolean} anew do not take a copy of the browser's HTTP cache
   * @param {(bytes: number) => void} onBytes @param {AbortSignal} [signal]
   */
  async #receive(shard, anew, onBytes, signal) {
    let pieces = this.begun.get(shard.sha256) ?? [];
    let length = pieces.reduce((sum, piece) => sum + piece.length, 0);
    /** @type {Record<string, string>} */
    const headers = length ? { range: `bytes=${length}-` } : {};
    const answer = await this.use.fetch(this.#address(shard), { headers, signal, cache: anew ? "reload" : "default" });
    if (answer.status !== 200 && answer.status !== 206) {
      throw new StorageError(`The site has no ${pathOf(shard)} (${answer.status}): upload it again, then try again.`);
    }
    const resumed = answer.status === 206 && answer.headers.get("content-range")?.startsWith(`bytes ${length}-`);
    if (!resumed) [pieces, length] = [[], 0]; // the server sends the whole again
    this.begun.set(shard.sha256, pieces);
    const reader = /** @type {ReadableStream<Uint8Array>} */ (answer.body).getReader();
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      pieces.push(value);
      length += value.length;
      onBytes(length);
      if (length > shard.size) break; // not the shard: the hash says so
    }
    if (length < shard.size) return null;
    return joined(pieces);
  }
}
