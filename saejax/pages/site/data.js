"use strict";
// Loads the data files: scripts that call `saejax` with what they hold.
((dashboard) => {
  const KEPT = 8; // files of features
  const arrived = new Map(), waiting = new Map();
  const data = { meta: null, list: null };

  window.saejax = (kind, number, value) => arrived.set(`${kind}/${number}`, value);

  function load(kind, number, address) {
    const key = `${kind}/${number}`;
    if (arrived.has(key)) return Promise.resolve(arrived.get(key));
    if (!waiting.has(key)) waiting.set(key, asked(key, address).finally(() => waiting.delete(key)));
    return waiting.get(key);
  }

  function asked(key, address) {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = address;
      script.onload = () => {
        script.remove();
        if (arrived.has(key)) resolve(arrived.get(key));
        else reject(new Error(`${address} holds no data`));
      };
      script.onerror = () => {
        script.remove();
        reject(new Error(`${address} cannot be read`));
      };
      document.head.append(script);
    });
  }

  async function loadMeta() {
    data.meta = await load("meta", 0, "data/meta.js");
  }

  const loadMap = () => load("map", 0, "data/map.js");

  const padded = (n, width) => String(n).padStart(width, "0");
  function loadFeatures(feature) {
    const number = Math.floor(feature / data.meta.per_file), folder = Math.floor(number / data.meta.per_folder);
    const kept = [...arrived.keys()].filter((key) => key.startsWith("features/"));
    while (kept.length > KEPT) arrived.delete(kept.shift());
    return load("features", number, `data/features/${padded(folder, 3)}/${padded(number, 6)}.js`);
  }

  function emptyList(n) {
    const numbers = Object.fromEntries(["density", "max", "mean", "fired"].map((name) => [name, new Float64Array(n)]));
    return { ready: 0, ...numbers, tokens: [], logits: [], said: new Map() };
  }

  function addToList(part) {
    const { list } = data;
    for (const name of ["density", "max", "mean", "fired"]) list[name].set(part[name], part.first);
    for (const name of ["tokens", "logits"]) part[name].forEach((texts, i) => { list[name][part.first + i] = texts; });
    part.said.forEach(([feature, text]) => list.said.set(feature, text));
    list.ready = part.first + part.tokens.length;
  }

  // The lines of all features, once; says "list-grew" after each file.
  async function loadList() {
    if (data.list) return;
    data.list = emptyList(data.meta.features);
    for (let i = 0; i * data.meta.list < data.meta.features; i++) {
      addToList(await load("list", i, `data/list/${padded(i, 3)}.js`));
      arrived.delete(`list/${i}`);
      document.dispatchEvent(new Event("list-grew"));
    }
  }

  Object.assign(dashboard, { data, loadMeta, loadMap, loadFeatures, loadList });
})(window.dashboard);
