// The engine over HTTP. The page knows an engine only by this interface; an engine inside the browser has the same.

/**
 * @typedef {object} Progress
 * @property {string} state queued, loading or running
 * @property {number} position jobs before this one
 * @property {number} step
 * @property {number} steps
 * @property {number | null} seconds_left
 * @property {string} [words] of a download, for the person
 * @property {number} [share] of the download that is done
 */
/**
 * @typedef {object} Filled
 * @property {Blob} picture as PNG or TIFF, without loss, to go on from
 * @property {Blob} file in the source's own format, with its metadata
 * @property {string} name of the file
 * @property {number} seed
 * @property {string[]} notes
 */

export class EngineError extends Error {
  /** @param {string} words @param {number} [status] of the HTTP answer */
  constructor(words, status = 0) {
    super(words);
    this.status = status;
  }
}

export class ServerEngine {
  /** @param {() => Promise<string>} askToken asked once where the server wants a token */
  constructor(askToken) {
    this.askToken = askToken;
    const given = /[#&]token=([^&]+)/.exec(location.hash);
    if (given) {
      sessionStorage.setItem("token", decodeURIComponent(given[1]));
      history.replaceState(null, "", location.pathname);
    }
  }

  /** What the bundle and the server are. @returns {Promise<any>} */
  async describe() {
    return (await this.#call("/api/v1/defaults")).json();
  }

  /** A picture that the browser cannot decode, as PNG. @param {Blob} file @param {string} name @returns {Promise<Blob>} */
  async preview(file, name) {
    const form = new FormData();
    form.append("image", file, name);
    return (await this.#call("/api/v1/preview", { method: "POST", body: form })).blob();
  }

  /**
   * The mask of the object at clicked points. @param {Blob} file @param {string} name
   * @param {number[][]} clicks [x, y, 1 or 0] @returns {Promise<Blob>}
   */
  async select(file, name, clicks) {
    const form = new FormData();
    form.append("image", file, name);
    form.append("clicks", JSON.stringify(clicks));
    return (await this.#call("/api/v1/select", { method: "POST", body: form })).blob();
  }

  /**
   * @param {{blob: Blob, name: string, format: string}} source `format`: the suffix that the file is wanted in
   * @param {Blob} mask white is filled
   * @param {Record<string, unknown>} options
   * @param {(progress: Progress) => void} onProgress
   * @param {AbortSignal} signal
   * @returns {Promise<Filled>}
   */
  async inpaint(source, mask, options, onProgress, signal) {
    const form = new FormData();
    form.append("image", source.blob, source.name);
    form.append("mask", mask, "mask.png");
    form.append("options", JSON.stringify(options));
    const created = await (await this.#call("/api/v1/jobs", { method: "POST", body: form, signal })).json();
    const path = `/api/v1/jobs/${created.id}`;
    const drop = () => void this.#call(path, { method: "DELETE", keepalive: true }).catch(() => undefined);
    signal.addEventListener("abort", drop);
    try {
      const last = await this.#follow(path, onProgress, signal);
      if (last.state !== "done") throw new EngineError(last.error ?? `the job is ${last.state}`);
      const own = await this.#call(`${path}/result${source.format ? `?format=${source.format}` : ""}`, { signal });
      const file = await own.blob();
      const disposition = own.headers.get("content-disposition") ?? "";
      const name = decodeURIComponent(/filename\*=UTF-8''(.+)$/.exec(disposition)?.[1] ?? "filled.png");
      const lossless = ["image/png", "image/tiff"].includes(file.type);
      const picture = lossless ? file : await this.#lossless(path, signal);
      return { picture, file, name, seed: last.seed, notes: last.notes };
    } finally {
      signal.removeEventListener("abort", drop);
    }
  }

  /** The result without loss: PNG, or TIFF where PNG cannot hold it (CMYK). @param {string} path @param {AbortSignal} signal */
  async #lossless(path, signal) {
    try {
      return await (await this.#call(`${path}/result?format=png`, { signal })).blob();
    } catch (error) {
      if (!(error instanceof EngineError && error.status === 400)) throw error;
      return (await this.#call(`${path}/result?format=tif`, { signal })).blob();
    }
  }

  /**
   * Reads the stream of events to its end; gives the last status.
   * @param {string} path @param {(progress: Progress) => void} onProgress @param {AbortSignal} signal
   */
  async #follow(path, onProgress, signal) {
    const answer = await this.#call(`${path}/events`, { signal });
    if (!answer.body) throw new EngineError("the server sent no progress");
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    let last = null;
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      rest += value;
      const events = rest.split("\n\n");
      rest = events.pop() ?? "";
      for (const event of events) {
        const data = /^data: (.*)$/m.exec(event);
        if (!data) continue;
        last = JSON.parse(data[1]);
        if (last.state === "queued" || last.state === "running") onProgress(last);
      }
    }
    if (!last) throw new EngineError("the connection to the server ended");
    return last;
  }

  /**
   * @param {string} path @param {RequestInit} init @returns {Promise<Response>} one with a good status
   */
  async #call(path, init = {}) {
    for (let attempt = 0; ; attempt++) {
      const token = sessionStorage.getItem("token");
      const headers = token ? { authorization: `Bearer ${token}` } : undefined;
      /** @type {Response} */
      let answer;
      try {
        answer = await fetch(path, { ...init, headers });
      } catch (error) {
        if (error instanceof DOMException && error.name === "AbortError") throw error;
        throw new EngineError("the server cannot be reached; is it still running?");
      }
      if (answer.ok) return answer;
      if (answer.status === 401 && attempt < 3) {
        sessionStorage.setItem("token", await this.askToken());
        continue;
      }
      const words = await answer.json().catch(() => ({}));
      throw new EngineError(words.detail ?? `the server answered ${answer.status}`, answer.status);
    }
  }
}
