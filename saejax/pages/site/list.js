"use strict";
// The front page: figures, charts, and the list of features with its search.
((dashboard) => {
  const { main, el, card, note, figures, number, count, percent, word, hits, lit, link, failed } = dashboard;
  const { data, readyOf, readColumns, hasLines, readLines, textsOf, matches, ordered } = dashboard;
  const PAGE = 50, SORTS = ["number", "density", "max", "mean"];
  let redraw = () => {};

  // What the list shows is in the address: a page can be shared and gone back to.
  function stateOf(p) {
    return {
      q: p.get("q") || "", sort: SORTS.includes(p.get("sort")) ? p.get("sort") : "", dir: p.get("dir") === "-1" ? -1 : 1,
      page: Math.max(0, parseInt(p.get("page"), 10) || 0), dead: p.get("dead") === "1",
    };
  }

  function addressOf(state) {
    const p = new URLSearchParams();
    if (state.q) p.set("q", state.q);
    if (state.sort) p.set("sort", state.sort);
    if (state.dir < 0) p.set("dir", "-1");
    if (state.page) p.set("page", state.page);
    if (state.dead) p.set("dead", "1");
    return `#${p}`;
  }

  const queryOf = (state) => state.q.toLowerCase();
  const sortOf = (state) => state.sort || (state.q && state.dir > 0 ? "match" : "number");

  // The columns that must have been read to the end to know what is shown.
  function needsOf(state) {
    const by = sortOf(state), names = state.q ? ["words", "tokens", "said", "logits"] : [];
    const density = !state.dead || data.meta.points > 0; // the map shows who is dead
    return [...names, ...(density ? ["density"] : []), ...(by in data.list ? [by] : [])];
  }

  // The features that have been read, are wanted and fit, in their order.
  function chosen(state) {
    const ready = readyOf(needsOf(state)), { list } = data, by = sortOf(state), match = matches(queryOf(state), ready);
    const found = new Uint32Array(ready).map((_, i) => i)
      .filter((i) => (state.dead || list.density[i] > 0) && match[i] < Infinity);
    if (by !== "number") return ordered(found, by === "match" ? match : list[by], state.dir < 0);
    return state.dir < 0 ? found.reverse() : found;
  }

  function row(i, query) {
    const { list, meta } = data, said = list.said.get(i) || "", shown = (text) => word(text, query);
    return el("tr", {},
      el("td", {}, el("a", { href: link(i) }, String(i))),
      meta.explained ? el("td", { class: "said" }, ...lit(said, hits(said, query.trim()))) : null,
      el("td", { class: "n" }, list.density[i] ? percent(list.density[i]) : "dead"),
      el("td", { class: "n" }, number(list.max[i])),
      el("td", { class: "n wide" }, number(list.mean[i])),
      el("td", { class: "words" }, ...textsOf("tokens", i).map(shown)),
      el("td", { class: "words wide" }, ...textsOf("logits", i).map(shown)));
  }

  // The head of a column that sorts by `name`, the largest first but for the number.
  function sorter(state, change, [name, text, kind]) {
    const button = el("button", { type: "button", "data-sort": name, onclick: () => {
      change({ sort: name, dir: sortOf(state) === name ? -state.dir : name === "number" ? 1 : -1 }, true);
    } });
    const head = el("th", { class: kind, scope: "col" }, button);
    head.update = () => {
      const way = sortOf(state) !== name ? "none" : state.dir > 0 ? "ascending" : "descending";
      button.textContent = text + { none: "", ascending: " \u25b2", descending: " \u25bc" }[way];
      head.setAttribute("aria-sort", way);
    };
    return head;
  }

  function tableOf(heads, rows) {
    const [first, ...rest] = heads;
    return el("table", { id: "list" }, el("thead", {}, el("tr", {}, first,
      data.meta.explained ? el("th", { scope: "col" }, "Explanation") : null, ...rest,
      el("th", { scope: "col" }, "Fires on"), el("th", { class: "wide", scope: "col" }, "Promotes"))), rows);
  }

  function searchTools(state, change) {
    const hint = `Search ${data.meta.explained ? "explanations, " : ""}tokens, promoted tokens or a number`;
    const search = el("input", { type: "search", id: "search", placeholder: hint, "aria-label": "Search", value: state.q });
    const dead = el("input", { type: "checkbox", id: "dead" });
    dead.checked = state.dead;
    let timer = 0;
    search.addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(() => change({ q: search.value }), 120);
    });
    dead.addEventListener("change", () => change({ dead: dead.checked }));
    return el("div", { class: "tools" }, search, el("label", {}, dead, "show dead"));
  }

  function pageTools(change) {
    const before = el("button", { id: "before", type: "button" }, "Back");
    const after = el("button", { id: "after", type: "button" }, "Next");
    const tools = el("div", { class: "tools" }, before, after);
    let page = 0;
    before.addEventListener("click", () => change({ page: page - 1 }, true));
    after.addEventListener("click", () => change({ page: page + 1 }, true));
    tools.update = (here, pages) => {
      page = here;
      before.disabled = page === 0;
      after.disabled = page >= pages - 1;
    };
    return tools;
  }

  function statusOf(found, page, pages, state) {
    const { meta } = data, ready = readyOf(needsOf(state));
    const part = ready < meta.features ? ` (${count(ready)} of ${count(meta.features)} read so far)` : "";
    const order = sortOf(state) === "match" ? ", best match first" : "";
    if (found) return `${count(found)} features${part}, page ${page + 1} of ${count(pages)}${order}`;
    return `No feature matches${part}. Search looks at numbers, top tokens, explanations and promoted tokens; blanks count. `
      + "The text of the examples: saejax search text.";
  }

  const sampleOf = ({ points, features }) => (
    points < features ? `A sample of ${count(points)} of ${count(features)} features. ` : "");

  function intro(map) {
    const { meta } = data;
    const links = meta.links.map(([label, address]) => el("a", { href: address }, label));
    return [
      el("h1", {}, meta.title), figures(meta.figures), links.length ? el("p", {}, ...links) : "",
      card(el("h2", {}, "Firing density of the features"), dashboard.densityChart(),
        note("Share of tokens on which a feature is active.")),
      map ? card(el("h2", {}, "Map of the features"), map, note(`${sampleOf(meta)}UMAP of the decoder `
        + "directions: near points are like directions, far distances say little. What the search finds stands out.")) : ""];
  }

  // y: where the page is scrolled to once there are rows enough; whoever does something before has his way.
  function front(state, y) {
    const rows = el("tbody"), status = el("p", { class: "soft", id: "status", role: "status" });
    const map = data.meta.points ? dashboard.map() : null, turn = pageTools(change);
    const columns = [["number", "Feature", ""], ["density", "Density", "n"], ["max", "Max", "n"], ["mean", "Mean", "n wide"]];
    const heads = columns.map((column) => sorter(state, change, column));

    function change(more, push) {
      Object.assign(state, { page: 0 }, more);
      if (push) history.pushState(null, "", addressOf(state));
      else history.replaceState(history.state, "", addressOf(state));
      draw();
    }

    function draw() {
      heads.forEach((head) => head.update());
      const found = chosen(state), pages = Math.max(1, Math.ceil(found.length / PAGE));
      const page = Math.min(state.page, pages - 1); // the page that was asked for may not have been read yet
      const shown = found.slice(page * PAGE, (page + 1) * PAGE), text = statusOf(found.length, page, pages, state);
      turn.update(page, pages);
      if (map) map.show(found, queryOf(state) !== "");
      if (hasLines(shown)) fill(shown, text);
      else {
        status.textContent = `${text}, reading its lines`;
        readFor(shown, text);
      }
      readColumns(needsOf(state)).catch(failed);
    }

    function fill(shown, text) {
      const wants = `${queryOf(state)} ${shown.join()}`;
      if (filled !== wants) rows.replaceChildren(...Array.from(shown, (i) => row(i, queryOf(state))));
      filled = wants; // rows that are there already stay: somebody may be pointing at them
      status.textContent = text;
      if (wanted === null) return;
      scrollTo(0, wanted);
      if (Math.abs(scrollY - wanted) < 2 || readyOf(needsOf(state)) === data.meta.features) wanted = null;
    }

    // Lines of one page at a time; they are shown if the list still says what it said, though more may have been read meanwhile.
    async function readFor(shown, text) {
      if (reading) return;
      reading = true;
      const asked = addressOf(state);
      await readLines(shown).catch(failed);
      reading = false;
      if (!rows.isConnected) return;
      if (addressOf(state) === asked) fill(shown, text);
      redraw();
    }

    let reading = false, filled = "";
    let wanted = y;
    const stay = () => { wanted = null; };
    for (const name of ["wheel", "pointerdown", "keydown"]) addEventListener(name, stay, { once: true, passive: true });

    redraw = () => { if (rows.isConnected) draw(); };
    main.replaceChildren(...intro(map), el("h2", {}, "Features"), searchTools(state, change), status, tableOf(heads, rows), turn);
    draw();
  }

  document.addEventListener("list-grew", () => redraw());

  Object.assign(dashboard, { front, stateOf });
})(window.dashboard);
