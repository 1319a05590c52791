"use strict";
// Loads the data files: scripts that call `saejax` with what they hold.
((dashboard) => {
  const KEPT = 8; // files of features
  const AT_ONCE = 4; // files of a column that are asked for together
  const PAUSE = 300; // milliseconds between two "list-grew"
  const NUMBERS = ["density", "max", "mean"], WORDS = ["tokens", "logits"];
  const TYPES = { Float32Array, Uint16Array, Uint32Array };
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

  const padded = (n, width) => String(n).padStart(width, "0");

  // A file that need not be kept.
  async function loadOnce(kind, number) {
    const value = await load(kind, number, `data/${kind}/${padded(number, 4)}.js`);
    arrived.delete(`${kind}/${number}`);
    return value;
  }

  // The typed array that a name and a base64 text stand for.
  function unpacked([type, text]) {
    const characters = atob(text), bytes = new Uint8Array(characters.length);
    for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
    return new TYPES[type](bytes.buffer);
  }

  const multiples = (step, end) => Array.from({ length: Math.ceil(end / step) }, (_, i) => i * step);

  // The last of the rising `firsts` that is not above n; -1 if all are.
  function placeOf(firsts, n) {
    let low = 0, high = firsts.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (firsts[middle] <= n) low = middle + 1;
      else high = middle;
    }
    return low - 1;
  }

  async function loadMeta() {
    data.meta = await load("meta", 0, "data/meta.js");
    data.list = emptyList(data.meta);
  }

  // {feature, x, y} of the points.
  async function loadMap() {
    const { points, map_part: part } = data.meta;
    const places = { feature: new Uint32Array(points), x: new Uint16Array(points), y: new Uint16Array(points) };
    await Promise.all(multiples(part, points).map(async (first, number) => {
      const file = await loadOnce("map", number);
      for (const name of Object.keys(places)) places[name].set(unpacked(file[name]), first);
    }));
    return places;
  }

  // What is known of a feature, with the words that it names by number.
  async function loadFeature(feature) {
    const { folders, per_folder: per } = data.meta, folder = placeOf(folders, feature);
    const place = `data/features/${padded(folder, 4)}`;
    const firsts = await load("firsts", folder, `${place}/firsts.js`);
    const within = placeOf(firsts, feature), number = folder * per + within;
    const kept = [...arrived.keys()].filter((key) => key.startsWith("features/"));
    while (kept.length > KEPT) arrived.delete(kept.shift());
    const file = await load("features", number, `${place}/${padded(number, 6)}.js`);
    return { ...file[feature - firsts[within]], words: file.flatMap((f) => f.words) };
  }

  // A column of the list, in files that begin with `firsts`. ready: of so many features it has been read; done: of all.
  function column(kind, firsts, end, add) {
    const has = new Set();
    let next = 0;
    return {
      get ready() { return next < firsts.length ? firsts[next] : end; },
      get done() { return next === firsts.length; },
      firsts, has, started: false,
      async read(number) {
        if (has.has(number)) return;
        const value = await loadOnce(kind, number);
        if (has.has(number)) return;
        add(value, firsts[number], number);
        has.add(number);
        while (has.has(next)) next++;
      },
    };
  }

  function emptyList({ features: n, part, shown, words, said }) {
    const list = { words: [], said: new Map(), saidFiles: [], columns: {} };
    const packedColumn = (name, values, width) => {
      list[name] = values;
      const add = (value, first) => values.set(unpacked(value), first * width);
      list.columns[name] = column(name, multiples(part, n), n, add);
    };
    for (const name of NUMBERS) packedColumn(name, new Float32Array(n), 1);
    for (const name of WORDS) packedColumn(name, new Uint32Array(n * shown), shown);
    list.columns.words = column("words", words, n, (texts, first) => {
      texts.forEach((text, i) => { list.words[first + i] = text; });
    });
    list.columns.said = column("said", said, n, (lines, first, number) => {
      list.saidFiles[number] = lines;
      for (const [feature, text] of lines) list.said.set(feature, text);
    });
    return list;
  }

  // Up to which feature all of these columns have been read. Words are of no use before all are there.
  function readyOf(names) {
    const { columns } = data.list, ready = (name) => (name === "words" && !columns.words.done ? 0 : columns[name].ready);
    return Math.min(data.meta.features, ...names.map(ready));
  }

  // Reads these columns to their end, each once; says "list-grew" now and then.
  const readColumns = (names) => Promise.all(names.map(readColumn));

  async function readColumn(name) {
    const { [name]: one } = data.list.columns;
    if (one.started) return;
    one.started = true;
    let number = 0;
    const reader = async () => {
      while (number < one.firsts.length) {
        await one.read(number++);
        grew();
      }
    };
    await Promise.all(Array.from({ length: AT_ONCE }, reader));
  }

  let said = 0, timer = 0;
  function grew() {
    timer ||= setTimeout(() => {
      timer = 0;
      document.dispatchEvent(new Event("list-grew"));
      said = performance.now();
    }, said + PAUSE - performance.now());
  }

  // The files that must be read for the lines of these features: [column, number of the file] each.
  function lacking(features) {
    const { list, meta } = data, { words, ...columns } = list.columns, found = new Map();
    const need = (name, one, i) => {
      const number = placeOf(one.firsts, i);
      if (number >= 0 && !one.has.has(number)) found.set(`${name}/${number}`, [one, number]);
    };
    for (const i of features) {
      for (const [name, one] of Object.entries(columns)) need(name, one, i);
      for (const name of WORDS) {
        for (const word of list[name].subarray(i * meta.shown, (i + 1) * meta.shown)) need("words", words, word);
      }
    }
    return [...found.values()];
  }

  const hasLines = (features) => lacking(features).length === 0;

  async function readLines(features) {
    for (let files = lacking(features); files.length; files = lacking(features)) {
      await Promise.all(files.map(([one, number]) => one.read(number)));
    }
  }

  // The texts of a feature's `tokens` or `logits`.
  function textsOf(name, i) {
    const { list, meta } = data;
    return Array.from(list[name].subarray(i * meta.shown, (i + 1) * meta.shown)).filter((word) => word > 0)
      .map((word) => list.words[word]);
  }

  Object.assign(dashboard, { data, loadMeta, loadMap, loadFeature, readyOf, readColumns, hasLines, readLines, textsOf });
})(window.dashboard);
