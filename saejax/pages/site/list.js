"use strict";
// The front page: figures, charts, and the list of features with its search.
((dashboard) => {
  const { main, el, card, note, figures, number, count, percent, word, link, failed, data, loadList } = dashboard;
  const PAGE = 50, SORTS = ["density", "max", "mean"];
  let redraw = () => {};

  // What the list shows is in the address: a page can be shared and gone back to.
  function stateOf(p) {
    return {
      q: p.get("q") || "", sort: SORTS.includes(p.get("sort")) ? p.get("sort") : "number", dir: p.get("dir") === "-1" ? -1 : 1,
      page: Math.max(0, parseInt(p.get("page"), 10) || 0), dead: p.get("dead") === "1",
    };
  }

  function addressOf(state) {
    const p = new URLSearchParams();
    if (state.q) p.set("q", state.q);
    if (state.sort !== "number") p.set("sort", state.sort);
    if (state.dir < 0) p.set("dir", "-1");
    if (state.page) p.set("page", state.page);
    if (state.dead) p.set("dead", "1");
    return `#${p}`;
  }

  // A blank before the text counts, for many tokens begin with one; blanks behind it do not.
  const queryOf = (state) => state.q.trimEnd().toLowerCase();

  function fits(i, query) {
    if (!query || String(i) === query.trim()) return true;
    const { tokens, logits, said } = data.list;
    return [...tokens[i], ...logits[i], ` ${said.get(i) || ""}`].some((t) => t.toLowerCase().includes(query));
  }

  function chosen(state) {
    const found = [], query = queryOf(state), { list } = data;
    for (let i = 0; i < list.ready; i++) if ((state.dead || list.fired[i] !== 0) && fits(i, query)) found.push(i);
    if (state.sort !== "number") {
      const key = list[state.sort];
      found.sort((a, b) => state.dir * (key[a] - key[b]) || a - b);
    } else if (state.dir < 0) found.reverse();
    return found;
  }

  function row(i) {
    const { list, meta } = data;
    return el("tr", {},
      el("td", {}, el("a", { href: link(i) }, String(i))),
      meta.explained ? el("td", { class: "said" }, list.said.get(i) || "") : null,
      el("td", { class: "n" }, list.fired[i] ? percent(list.density[i]) : "dead"),
      el("td", { class: "n" }, number(list.max[i])),
      el("td", { class: "n wide" }, number(list.mean[i])),
      el("td", { class: "words" }, ...list.tokens[i].map(word)),
      el("td", { class: "words wide" }, ...list.logits[i].map(word)));
  }

  // The head of a column that sorts by `name`, the largest first but for the number.
  function sorter(state, change, [name, text, kind]) {
    const button = el("button", { type: "button", "data-sort": name, onclick: () => {
      change({ sort: name, dir: state.sort === name ? -state.dir : name === "number" ? 1 : -1 }, true);
    } });
    const head = el("th", { class: kind, scope: "col" }, button);
    head.update = () => {
      const way = state.sort !== name ? "none" : state.dir > 0 ? "ascending" : "descending";
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

  function statusOf(found, page, pages) {
    const { list, meta } = data;
    const part = list.ready < meta.features ? ` (${count(list.ready)} of ${count(meta.features)} read so far)` : "";
    if (found) return `${count(found)} features${part}, page ${page + 1} of ${count(pages)}`;
    return `No feature matches${part}. Search looks at numbers, top tokens, promoted tokens and explanations; `
      + "a blank before the text counts.";
  }

  function intro(map) {
    const { meta } = data;
    const links = meta.links.map(([label, address]) => el("a", { href: address }, label));
    return [
      el("h1", {}, meta.title), figures(meta.figures), links.length ? el("p", {}, ...links) : "",
      card(el("h2", {}, "Firing density of the features"), dashboard.densityChart(),
        note("Share of tokens on which a feature is active.")),
      map ? card(el("h2", {}, "Map of the features"), map, note("UMAP of the decoder directions: near points are like "
        + "directions, far distances say little. What the search finds stands out.")) : ""];
  }

  function front(state) {
    const rows = el("tbody"), status = el("p", { class: "soft", id: "status", role: "status" });
    const map = data.meta.map ? dashboard.map() : null, turn = pageTools(change);
    const columns = [["number", "Feature", ""], ["density", "Density", "n"], ["max", "Max", "n"], ["mean", "Mean", "n wide"]];
    const heads = columns.map((column) => sorter(state, change, column));

    function change(more, push) {
      Object.assign(state, { page: 0 }, more);
      history[push ? "pushState" : "replaceState"](null, "", addressOf(state));
      draw();
    }

    function draw() {
      heads.forEach((head) => head.update());
      const found = chosen(state), pages = Math.max(1, Math.ceil(found.length / PAGE));
      const page = Math.min(state.page, pages - 1); // the page that was asked for may not have been read yet
      rows.replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map(row));
      status.textContent = statusOf(found.length, page, pages);
      turn.update(page, pages);
      if (map) map.show(found, queryOf(state) !== "");
    }

    redraw = () => { if (rows.isConnected) draw(); };
    loadList().catch(failed);
    main.replaceChildren(...intro(map), el("h2", {}, "Features"), searchTools(state, change), status, tableOf(heads, rows), turn);
    draw();
  }

  document.addEventListener("list-grew", () => redraw());

  Object.assign(dashboard, { front, stateOf });
})(window.dashboard);
