"use strict";
// Draws the dashboard. Every text is set with textContent; nothing is ever parsed as HTML.
(() => {
  const PAGE = 50;
  const main = document.getElementById("main"), tip = document.getElementById("tip");
  const waiting = new Map(), chunks = new Map();
  let meta = null, list = null;

  // Data files call this with what they hold.
  window.saejax = (kind, number, value) => chunks.set(`${kind}/${number}`, value);

  function load(kind, number, address) {
    const key = `${kind}/${number}`;
    if (chunks.has(key)) return Promise.resolve(chunks.get(key));
    if (!waiting.has(key)) {
      waiting.set(key, new Promise((resolve, reject) => {
        const script = document.createElement("script");
        script.src = address;
        script.onload = () => { script.remove(); waiting.delete(key); chunks.has(key) ? resolve(chunks.get(key)) : reject(new Error(`${address} holds no data`)); };
        script.onerror = () => { script.remove(); waiting.delete(key); reject(new Error(`${address} cannot be read`)); };
        document.head.append(script);
      }));
    }
    return waiting.get(key);
  }

  const pad = (n, width) => String(n).padStart(width, "0");
  function loadFeatures(feature) {
    const number = Math.floor(feature / meta.per_file), folder = Math.floor(number / meta.per_folder);
    const kept = [...chunks.keys()].filter((k) => k.startsWith("features/"));
    while (kept.length > 8) chunks.delete(kept.shift());
    return load("features", number, `data/features/${pad(folder, 3)}/${pad(number, 6)}.js`);
  }

  function el(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "class") node.className = value;
      else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value === true) node.setAttribute(name, "");
      else if (value !== false && value != null) node.setAttribute(name, value);
    }
    node.append(...children.filter((c) => c != null).map((c) => (typeof c === "number" ? String(c) : c)));
    return node;
  }
  function svg(tag, attributes = {}, ...children) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  const number = (v) => v == null ? "-" : Math.abs(v) >= 1e5 || (v !== 0 && Math.abs(v) < 1e-3) ? v.toExponential(2) : String(Number(v.toPrecision(4)));
  const count = (v) => Math.round(v).toLocaleString("en-US");
  const percent = (v) => v === 0 ? "0" : v < 1e-4 ? `${(100 * v).toExponential(1)} %` : `${Number((100 * v).toPrecision(3))} %`;
  const word = (text) => el("span", { class: "text word" }, text);
  const link = (feature) => `#feature=${feature}`;

  // ---- charts -------------------------------------------------------------------------------------------------------------
  // bars: [{label, value, kind}], ticks: [[place in bars, text]]; heights are logarithmic, so that one token in a million shows.
  function chart(bars, ticks, label, narrow) {
    const W = narrow || main.clientWidth < 640 ? 340 : 600, H = W < 600 ? 130 : 170, left = 8, bottom = 22, top = 14;
    const most = Math.max(1, ...bars.map((b) => b.value));
    const height = (v) => v <= 0 ? 0 : (H - bottom - top) * (0.06 + 0.94 * Math.log(1 + v) / Math.log(1 + most));
    const step = (W - 2 * left) / bars.length;
    const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": label });
    bars.forEach((b, i) => {
      const bar = svg("rect", { class: `bar ${b.kind || ""}`, x: (left + i * step + 0.5).toFixed(1), width: Math.max(1, step - 1).toFixed(1),
        y: (H - bottom - height(b.value)).toFixed(1), height: height(b.value).toFixed(1) });
      const area = svg("rect", { x: (left + i * step).toFixed(1), width: step.toFixed(1), y: 0, height: H - bottom, fill: "transparent" });
      area.dataset.tip = b.label;
      picture.append(bar, area);
    });
    picture.append(svg("line", { class: "axis", x1: left, x2: W - left, y1: H - bottom, y2: H - bottom }));
    for (const [place, text] of ticks) {
      const x = left + place * step;
      const anchor = x < 40 ? "start" : x > W - 40 ? "end" : "middle";
      const t = svg("text", { x: x.toFixed(1), y: H - 6, "text-anchor": anchor });
      t.textContent = text;
      picture.append(t);
    }
    const peak = svg("text", { x: W - left, y: 11, "text-anchor": "end" });
    peak.textContent = `highest bar ${count(most)}, log scale`;
    picture.append(peak);
    return picture;
  }

  const power = (e) => e === 0 ? "1" : Number.isInteger(e) ? `10${[...String(e)].map((c) => "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"["-0123456789".indexOf(c)]).join("")}` : number(10 ** e);
  function densityChart() {
    const h = meta.histogram, bars = [{ label: `never: ${count(h.never)} features`, value: h.never, kind: "i8" }, { label: "", value: 0 }];
    h.counts.forEach((c, i) => bars.push({ value: c, label: `density ${power(h.log10_edges[i])} to ${power(h.log10_edges[i + 1])}: ${count(c)} features` }));
    const ticks = [[0, "never"]];
    h.log10_edges.forEach((e, i) => { if (Number.isInteger(e) && e > -7) ticks.push([i + 2, power(e)]); });
    return chart(bars, ticks, "Histogram of firing densities");
  }

  // ---- map ----------------------------------------------------------------------------------------------------------------
  // All features as points; those that the search finds stand out. Hover names the nearest point, a click opens it.
  function mapCard(state) {
    const canvas = el("canvas", { id: "map", role: "img", "aria-label": "Features by likeness of their decoder directions" });
    let places = null, found = [];
    const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);
    const at = (i) => [6 + places[0][i] / 9999 * (canvas.clientWidth - 12), 6 + places[1][i] / 9999 * (canvas.clientHeight - 12)];
    function paint() {
      if (!places || !canvas.isConnected) return;
      const scale = devicePixelRatio || 1, g = canvas.getContext("2d"), all = found.length === list.ready || !state.q.trim();
      canvas.width = canvas.clientWidth * scale; canvas.height = canvas.clientHeight * scale;
      g.scale(scale, scale);
      const dot = (i, size) => { const [x, y] = at(i); g.fillRect(x - size / 2, y - size / 2, size, size); };
      g.fillStyle = style("--bar"); g.globalAlpha = all ? 0.7 : 0.25;
      for (let i = 0; i < places[0].length; i++) if (!list.fired[i] || !all || i >= list.ready) dot(i, 2);
      g.fillStyle = style(all ? "--i5" : "--i9"); g.globalAlpha = 0.8;
      for (const i of found) if (list.fired[i]) dot(i, all ? 2.5 : 4);
    }
    function under(event) {
      const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
      let best = -1, least = 144;
      if (places) for (let i = 0; i < list.ready; i++) { const [a, b] = at(i), d = (a - x) ** 2 + (b - y) ** 2; if (d < least) { least = d; best = i; } }
      return best;
    }
    canvas.addEventListener("pointermove", (event) => {
      const i = under(event);
      canvas.dataset.tip = i < 0 ? "" : `${i}  ${list.said.get(i) || list.tokens[i].join(" ")}`;
      canvas.style.cursor = i < 0 ? "default" : "pointer";
      showTip(event);
    });
    canvas.addEventListener("click", (event) => { const i = under(event); if (i >= 0) location.hash = link(i); });
    new ResizeObserver(paint).observe(canvas);
    load("map", 0, "data/map.js").then((p) => { places = p; canvas.dataset.ready = "yes"; paint(); }).catch(failed);
    canvas.show = (features) => { found = features; paint(); };
    return canvas;
  }

  // ---- list ---------------------------------------------------------------------------------------------------------------
  async function loadList() {
    if (list) return;
    const n = meta.features;
    list = { ready: 0, density: new Float64Array(n), max: new Float64Array(n), mean: new Float64Array(n), fired: new Float64Array(n), tokens: new Array(n), logits: new Array(n), said: new Map() };
    for (let i = 0; i * meta.list < n; i++) {
      const part = await load("list", i, `data/list/${pad(i, 3)}.js`);
      chunks.delete(`list/${i}`);
      for (const name of ["density", "max", "mean", "fired"]) list[name].set(part[name], part.first);
      part.tokens.forEach((t, j) => { list.tokens[part.first + j] = t; });
      part.logits.forEach((t, j) => { list.logits[part.first + j] = t; });
      part.said.forEach(([feature, text]) => list.said.set(feature, text));
      list.ready = part.first + part.tokens.length;
      document.dispatchEvent(new Event("list-grew"));
    }
  }

  function chosen(state) {
    const found = [], query = state.q.trim().toLowerCase();
    for (let i = 0; i < list.ready; i++) {
      if (!state.dead && list.fired[i] === 0) continue;
      if (query && String(i) !== query && ![...list.tokens[i], ...list.logits[i], list.said.get(i) || ""].some((t) => t.toLowerCase().includes(query))) continue;
      found.push(i);
    }
    if (state.sort !== "number") { const key = list[state.sort]; found.sort((a, b) => state.dir * (key[a] - key[b]) || a - b); }
    else if (state.dir < 0) found.reverse();
    return found;
  }

  const stateOf = (p) => ({ q: p.get("q") || "", sort: ["density", "max", "mean"].includes(p.get("sort")) ? p.get("sort") : "number",
    dir: p.get("dir") === "-1" ? -1 : 1, page: Math.max(0, parseInt(p.get("page"), 10) || 0), dead: p.get("dead") === "1" });
  function addressOf(s) {
    const p = new URLSearchParams();
    if (s.q) p.set("q", s.q);
    if (s.sort !== "number") p.set("sort", s.sort);
    if (s.dir < 0) p.set("dir", "-1");
    if (s.page) p.set("page", s.page);
    if (s.dead) p.set("dead", "1");
    return `#${p}`;
  }

  function front(state) {
    const figures = el("div", { class: "figures" }, ...meta.figures.map(([label, value]) => el("div", {}, el("span", {}, label), el("b", {}, value))));
    const rows = el("tbody"), status = el("p", { class: "soft", id: "status", role: "status" });
    const search = el("input", { type: "search", id: "search", placeholder: meta.explained ? "Search explanations, tokens, promoted tokens or a number" : "Search tokens, promoted tokens or a number", "aria-label": "Search", value: state.q });
    const dead = el("input", { type: "checkbox", id: "dead" }), map = meta.map ? mapCard(state) : null;
    dead.checked = state.dead;
    const before = el("button", { id: "before", type: "button" }, "Back"), after = el("button", { id: "after", type: "button" }, "Next");
    const change = (more, push) => { Object.assign(state, { page: 0 }, more); history[push ? "pushState" : "replaceState"](null, "", addressOf(state)); draw(); };
    const heads = [["number", "Feature", ""], ["density", "Density", "n"], ["max", "Max", "n"], ["mean", "Mean", "n wide"]].map(([name, text, kind]) => {
      const button = el("button", { type: "button", "data-sort": name, onclick: () => change({ sort: name, dir: state.sort === name ? -state.dir : name === "number" ? 1 : -1 }, true) });
      const head = el("th", { class: kind, scope: "col" }, button);
      head.update = () => { const on = state.sort === name; button.textContent = text + (on ? (state.dir > 0 ? " \u25b2" : " \u25bc") : ""); head.setAttribute("aria-sort", on ? (state.dir > 0 ? "ascending" : "descending") : "none"); };
      return head;
    });
    function draw() {
      heads.forEach((h) => h.update());
      const found = chosen(state), pages = Math.max(1, Math.ceil(found.length / PAGE));
      state.page = Math.min(state.page, pages - 1);
      rows.replaceChildren(...found.slice(state.page * PAGE, (state.page + 1) * PAGE).map((i) => el("tr", {},
        el("td", {}, el("a", { href: link(i) }, String(i))), meta.explained ? el("td", { class: "said" }, list.said.get(i) || "") : null, el("td", { class: "n" }, list.fired[i] ? percent(list.density[i]) : "dead"), el("td", { class: "n" }, number(list.max[i])),
        el("td", { class: "n wide" }, number(list.mean[i])), el("td", { class: "words" }, ...list.tokens[i].map(word)), el("td", { class: "words wide" }, ...list.logits[i].map(word)))));
      const part = list.ready < meta.features ? ` (${count(list.ready)} of ${count(meta.features)} read so far)` : "";
      status.textContent = found.length ? `${count(found.length)} features${part}, page ${state.page + 1} of ${count(pages)}` : `No feature matches${part}. Search looks at numbers, top tokens, promoted tokens and explanations.`;
      if (map) map.show(found);
      before.disabled = state.page === 0; after.disabled = state.page >= pages - 1;
    }
    let timer = 0;
    search.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(() => change({ q: search.value }), 120); });
    dead.addEventListener("change", () => change({ dead: dead.checked }));
    before.addEventListener("click", () => change({ page: state.page - 1 }, true));
    after.addEventListener("click", () => change({ page: state.page + 1 }, true));
    main.replaceChildren(el("h1", {}, meta.title), figures, meta.links.length ? el("p", {}, ...meta.links.map(([label, address]) => el("a", { href: address }, label))) : "",
      el("div", { class: "card" }, el("h2", {}, "Firing density of the features"), densityChart(), el("p", { class: "soft" }, "Share of tokens on which a feature is active.")),
      map ? el("div", { class: "card" }, el("h2", {}, "Map of the features"), map, el("p", { class: "soft" }, "UMAP of the decoder directions: near points are like directions, far distances say little. What the search finds stands out.")) : "",
      el("h2", {}, "Features"), el("div", { class: "tools" }, search, el("label", {}, dead, "show dead")), status,
      el("table", { id: "list" }, el("thead", {}, el("tr", {}, heads[0], meta.explained ? el("th", { scope: "col" }, "Explanation") : null, ...heads.slice(1), el("th", { scope: "col" }, "Fires on"), el("th", { class: "wide", scope: "col" }, "Promotes"))), rows),
      el("div", { class: "tools" }, before, after));
    main.grew = draw;
    draw();
    loadList().catch(failed);
  }

  // ---- feature ------------------------------------------------------------------------------------------------------------
  function example(e, words, f) {
    const [, value, context, position, start, tokens, sparse] = e, acts = new Map();
    for (let i = 0; i < sparse.length; i += 2) acts.set(sparse[i], sparse[i + 1]);
    const text = el("div", { class: "text" });
    tokens.forEach((w, i) => {
      const a = acts.get(i) || 0, token = el("span", { class: start + i === position ? "tok peak" : "tok" }, words[w]);
      if (a > 0) token.style.setProperty("--a", (0.12 + 0.78 * Math.min(1, a / f.max)).toFixed(3));
      token.dataset.tip = `${words[w]}  \u2192  ${a > 0 ? number(a) : "0"}  (token ${start + i})`;
      text.append(token);
    });
    return el("div", { class: "ex" }, el("div", { class: "where" }, `${number(value)} \u00b7 context ${context}, token ${position}`), text);
  }

  function groups(f, words) {
    const by = new Map();
    for (const e of f.examples) { if (!by.has(e[0])) by.set(e[0], []); by.get(e[0]).push(e); }
    const out = [];
    for (let g = 0; g <= meta.intervals; g++) {
      const i = g === 0 ? 0 : meta.intervals + 1 - g, found = by.get(i) || [];
      if (!found.length) continue;
      const low = f.max * (i - 1) / meta.intervals, high = f.max * i / meta.intervals;
      const title = i === 0 ? "Top contexts" : `${number(low)} to ${number(high)}`;
      const note = i === 0 ? `, each at its highest token` : ` \u00b7 interval ${i} of ${meta.intervals} \u00b7 about ${count(Math.max(found.length, f.interval_counts[i - 1]))} activations, ${found.length} at random`;
      out.push(el("details", { open: g < 4, "data-interval": i }, el("summary", {}, i ? el("span", { class: `chip i${i}` }) : null, title, el("span", { class: "soft" }, note)), ...found.map((e) => example(e, words, f))));
    }
    return out;
  }

  function linearChart(f) {
    const end = Math.min(f.linear.length, Math.ceil(f.max / f.linear_width)), bars = [];
    for (let i = 0; i < end; i++) {
      const low = i * f.linear_width, high = low + f.linear_width, middle = Math.min(f.max, (low + high) / 2);
      bars.push({ value: f.linear[i], kind: `i${Math.min(meta.intervals, Math.max(1, Math.ceil(meta.intervals * middle / f.max)))}`, label: `${number(low)} to ${number(high)}: ${count(f.linear[i])} tokens` });
    }
    return chart(bars, [[0, "0"], [end / 2, number(end / 2 * f.linear_width)], [end, number(end * f.linear_width)]], "Activations, equal bins", true);
  }
  function logChart(f) {
    const bars = [], ticks = [], n = f.log.length;
    for (let i = n - 1; i >= 0; i--) {
      const low = i === n - 1 ? 0 : f.log_edges[i + 1], high = f.log_edges[i], middle = Math.min(f.max, (low + high) / 2);
      bars.push({ value: f.log[i], kind: `i${Math.min(meta.intervals, Math.max(1, Math.ceil(meta.intervals * middle / f.max)))}`, label: `${number(low)} to ${number(high)}: ${count(f.log[i])} tokens` });
    }
    for (let i = n - 2; i > 0; i -= 8) ticks.push([n - i, number(f.log_edges[i])]);
    return chart(bars, ticks, "Activations, logarithmic bins", true);
  }

  const pairs = (rows) => el("div", { class: "rows" }, ...rows.flatMap(([left, right]) => [el("div", {}, left), el("div", { class: "v" }, right)]));
  function near(title, note, rows, value) {
    return el("div", { class: "card" }, el("h3", {}, title), rows.length ? pairs(rows.map((r) => [el("a", { href: link(r[0]) }, `${r[0]} `, r[1] ? word(r[1]) : ""), value(r)])) : el("p", { class: "soft" }, "none found"), el("p", { class: "soft" }, note));
  }

  async function feature(id) {
    const chunk = await loadFeatures(id), f = chunk.features[id - chunk.first], words = chunk.words;
    if (new URLSearchParams(location.hash.slice(1)).get("feature") !== String(id)) return; // left meanwhile
    const nav = el("div", { class: "nav" }, id > 0 ? el("a", { href: link(id - 1), rel: "prev" }, "\u2190 previous") : null, id + 1 < meta.features ? el("a", { href: link(id + 1), rel: "next" }, "next \u2192") : null, el("a", { href: "#", id: "all" }, "all features"));
    const facts = [["fires on", `${percent(f.density)} of tokens`], ["tokens", `${count(f.fired)} of ${count(meta.rows)}`], ["max", number(f.max)], ["mean when active", number(f.mean)],
      ["decoder norm", number(f.decoder_norm)], ["encoder norm", number(f.encoder_norm)], ["bias", number(f.bias)]];
    const figures = el("div", { class: "figures" }, ...facts.map(([label, value]) => el("div", {}, el("span", {}, label), el("b", {}, value))));
    const logits = f.up.length ? el("div", { class: "card", id: "logits" }, el("h3", {}, "Effect on the next token"), el("div", { class: "two" }, pairs(f.up.map(([w, v]) => [word(words[w]), `+${number(v)}`])), pairs(f.down.map(([w, v]) => [word(words[w]), number(v)]))),
      el("p", { class: "soft" }, "Direction through final norm and unembedding, per unit of activation.")) : null;
    const others = [near("Nearest by decoder", "cosine of the decoder directions", f.cosine, (r) => number(r[2]))];
    const title = el("h1", {}, `Feature ${id}`, f.said ? el("small", { id: "said" }, f.said) : null);
    if (f.fired === 0) {
      main.replaceChildren(nav, title, el("p", { class: "notice", id: "dead-notice" }, `Dead: this feature fired on none of the ${count(meta.rows)} tokens that were indexed. There are no examples.`), figures,
        el("div", { class: "grid" }, logits || "", ...others));
    } else {
      others.push(near("Fires together with", "correlation of firing, estimated from shared sampled tokens", f.firing, (r) => number(r[2])));
      main.replaceChildren(nav, title, figures,
        el("div", { class: "layout" }, el("div", {}, el("div", { class: "grid" },
          el("div", { class: "card" }, el("h3", {}, "Activations"), linearChart(f), el("p", { class: "soft" }, "Equal bins, coloured by tenths of the maximum.")),
          el("div", { class: "card" }, el("h3", {}, "Activations, logarithmic bins"), logChart(f), el("p", { class: "soft" }, "Four bins an octave; the first holds all that is lower."))),
        el("h2", {}, "Examples"), ...groups(f, words)),
        el("div", { class: "side" },
          el("div", { class: "card" }, el("h3", {}, "Fires on"), pairs(f.tokens.map(([w, share, mean]) => [word(words[w]), `${percent(share)} \u00b7 ${number(mean)}`])), el("p", { class: "soft" }, "share of its total activation, estimated from a sample \u00b7 mean there")),
          logits || "", ...others)));
    }
    document.title = `Feature ${id} - ${meta.title}`;
    scrollTo(0, 0);
    main.focus({ preventScroll: true });
  }

  // ---- page ---------------------------------------------------------------------------------------------------------------
  function failed(error) { main.replaceChildren(el("p", { class: "notice" }, `${error.message}. Keep the data folder beside index.html.`)); }
  function route() {
    tip.hidden = true;
    main.grew = null;
    const p = new URLSearchParams(location.hash.slice(1));
    if (!p.has("feature")) { document.title = `${meta.title} - features`; if (!list) startList(); front(stateOf(p)); return; }
    const id = /^\d+$/.test(p.get("feature")) ? Number(p.get("feature")) : NaN;
    if (!(id < meta.features)) { main.replaceChildren(el("p", { class: "notice", id: "no-such" }, `There is no feature ${p.get("feature").slice(0, 20)}: they are numbered 0 to ${meta.features - 1}.`), el("a", { href: "#" }, "all features")); return; }
    feature(id).catch(failed);
  }
  function startList() { loadList().catch(failed); }
  document.addEventListener("list-grew", () => { if (main.grew) main.grew(); });
  document.getElementById("go").addEventListener("submit", (event) => { event.preventDefault(); const v = document.getElementById("number").value.trim(); if (v) location.hash = `feature=${encodeURIComponent(v)}`; });
  function showTip(event) {
    const target = event.target.closest ? event.target.closest("[data-tip]") : null;
    if (!target || !target.dataset.tip) { tip.hidden = true; return; }
    tip.textContent = target.dataset.tip;
    tip.hidden = false;
    const box = target.getBoundingClientRect(), own = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(innerWidth - own.width - 4, (event.clientX || box.left) - own.width / 2))}px`;
    const top = target.id === "map" ? event.clientY - 6 : box.top, bottom = target.id === "map" ? event.clientY + 12 : box.bottom;
    tip.style.top = `${top > own.height + 60 ? top - own.height - 6 : bottom + 6}px`;
  }
  for (const name of ["pointerover", "click"]) document.addEventListener(name, showTip);
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
  addEventListener("popstate", () => { if (meta) route(); });
  load("meta", 0, "data/meta.js").then((m) => { meta = m; route(); }).catch(failed);
})();
