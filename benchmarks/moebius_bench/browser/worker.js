// Runs in a worker of a site's own page, as the site's engine does: loads one graph, runs it on the inputs of the device
// check, and answers every further message with the seconds of one more run.

/** @type {any} */
let loaded = null;

/** @param {{graph: string, provider: string, threads: number, root: string}} plan */
async function load({ graph, provider, threads, root }) {
  const at = (/** @type {string} */ path) => new URL(path, root).href;
  const { checkInputs, relativeError } = await import(at("page/js/engine/check_values.js"));
  const ort = await import(at("ort/ort.webgpu.min.mjs"));
  ort.env.wasm.wasmPaths = at("ort/");
  ort.env.wasm.numThreads = self.crossOriginIsolated ? threads : 1;
  ort.env.logLevel = "error";
  const site = await (await fetch(at("site.json"))).json();
  const files = site.graphs[graph];
  if (!files) throw new Error(`the site has no graph ${graph}; it has ${Object.keys(site.graphs).join(", ")}`);
  const content = async (/** @type {{sha256: string, size: number}[]} */ shards) => {
    const whole = new Uint8Array(shards.reduce((sum, { size }) => sum + size, 0));
    let place = 0;
    for (const { sha256, size } of shards) {
      const answer = await fetch(at(`shards/${sha256}.bin`));
      if (!answer.ok) throw new Error(`shards/${sha256}.bin: HTTP ${answer.status}`);
      whole.set(new Uint8Array(await answer.arrayBuffer()), place);
      place += size;
    }
    return whole;
  };
  const externalData = [];
  for (const [path, shards] of Object.entries(files.data)) externalData.push({ path, data: await content(shards) });
  const model = await content(files.model);
  const before = performance.now();
  const session = await ort.InferenceSession.create(model, {
    executionProviders: [provider],
    externalData,
    graphOptimizationLevel: "all",
  });
  const seconds = (performance.now() - before) / 1000;
  externalData.length = 0;
  const check = site.manifest.checks?.[graph];
  const drawn = checkInputs(site.manifest.graphs[graph] ?? site.manifest.decoders[graph], check?.drawn ?? 1);
  /** @type {Record<string, any>} */
  const feeds = {};
  for (const [name, { data, dims }] of Object.entries(drawn)) {
    feeds[name] = new ort.Tensor(data instanceof BigInt64Array ? "int64" : "float32", data, dims);
  }
  loaded = { session, feeds };
  const output = await once();
  return {
    load_seconds: seconds,
    threads: ort.env.wasm.numThreads,
    version: ort.env.versions.web,
    error: check ? relativeError(check, output) : null,
  };
}

async function once() {
  const [output] = Object.values(await loaded.session.run(loaded.feeds));
  return /** @type {any} */ (output).getData();
}

self.addEventListener("message", async (/** @type {MessageEvent} */ { data }) => {
  try {
    if (data) {
      self.postMessage({ done: await load(data) });
    } else {
      const before = performance.now();
      await once(); // the output is read, so that a GPU has finished
      self.postMessage({ done: (performance.now() - before) / 1000 });
    }
  } catch (error) {
    self.postMessage({ failed: error instanceof Error ? error.message : String(error) });
  }
});
