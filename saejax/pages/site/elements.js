"use strict";
// What the other scripts build pages of. Every text is set as text; nothing is ever parsed as HTML.
window.dashboard = {};
((dashboard) => {
  const main = document.getElementById("main");

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

  const card = (...children) => el("div", { class: "card" }, ...children);
  const note = (text) => el("p", { class: "soft" }, text);

  function figures(pairs) {
    const one = ([label, value]) => el("div", {}, el("span", {}, label), el("b", {}, value));
    return el("div", { class: "figures" }, ...pairs.map(one));
  }

  // Numbers as text.
  function number(v) {
    if (v == null) return "-";
    const size = Math.abs(v);
    return size >= 1e5 || (v !== 0 && size < 1e-3) ? v.toExponential(2) : String(Number(v.toPrecision(4)));
  }
  const count = (v) => Math.round(v).toLocaleString("en-US");
  function percent(v) {
    if (v === 0) return "0";
    return v < 1e-4 ? `${(100 * v).toExponential(1)} %` : `${Number((100 * v).toPrecision(3))} %`;
  }

  // A token: the blanks that begin it are drawn as open boxes, or written as such where there is only text.
  const marked = (text) => text.replace(/^ +/, (blanks) => "\u2423".repeat(blanks.length));
  function word(text, query = "") {
    const found = hits(text, query), [, blanks, first] = text.match(/^( *)(.?\p{M}*)/su), begin = blanks.length;
    const boxes = [...blanks].map((_, i) => el("span", { class: "blank" }, ...lit(text, found, i, i + 1)));
    const lead = el("span", { class: "lead" }, ...boxes, ...lit(text, found, begin, begin + first.length));
    return el("span", { class: "text word" }, lead, ...lit(text, found, begin + first.length));
  }

  // Where a query in small letters stands in a text: [begin, end] each. Nowhere if small letters have another length.
  function hits(text, query) {
    const found = [], low = text.toLowerCase();
    if (!query || low.length !== text.length) return found;
    for (let i = low.indexOf(query); i >= 0; i = low.indexOf(query, i + query.length)) found.push([i, i + query.length]);
    return found;
  }

  // A text from `begin` to `end`, with what is hit as <mark>.
  function lit(text, found, begin = 0, end = text.length) {
    const parts = [];
    let at = begin;
    for (const [from, to] of found) {
      const first = Math.max(from, at), last = Math.min(to, end);
      if (first < last) {
        parts.push(text.slice(at, first), el("mark", {}, text.slice(first, last)));
        at = last;
      }
    }
    return [...parts, text.slice(at, end)];
  }

  const link = (feature) => `#feature=${feature}`;

  function failed(error) {
    main.replaceChildren(el("p", { class: "notice" }, `${error.message}. Keep the data folder beside index.html.`));
  }

  Object.assign(dashboard, { main, el, svg, card, note, figures, number, count, percent, marked, word, hits, lit, link, failed });
})(window.dashboard);
