"use strict";
// A feature among its relatives in smaller and larger dictionaries: what it comes from, and what comes from it.
((dashboard) => {
  const { el, card, note, number, count, word, link, data } = dashboard;

  function line([level, feature, cosine, more, ...tokens], words, first, id) {
    const { own, sizes, names, addresses } = data.meta.splitting, size = count(sizes[level]);
    const mine = level === own && feature === id, address = level === own ? link(feature) : addresses[level];
    const to = level === own || !address ? address : `${address}${feature}`;
    const name = to && !mine ? el("a", { href: to }, feature) : el(mine ? "b" : "span", {}, feature);
    const says = [cosine === null ? "" : number(cosine), more > 0 ? `${count(more)} more` : ""].filter(Boolean);
    const node = el("div", { class: mine ? "kin mine" : "kin" },
      el("span", { class: "soft", title: names[level] }, `${size} `), name, " ",
      ...tokens.map((w) => word(words[w])), el("span", { class: "soft" }, says.join(" \u00b7 ")));
    node.style.setProperty("--depth", level - first);
    return node;
  }

  // The card; empty where no splitting was given, or the feature fired on nothing.
  function family(f, words) {
    const { splitting } = data.meta;
    if (!splitting || f.fired === 0) return "";
    const rows = f.family || [];
    const about = `cosine of the decoder directions to the line that it comes from, at least ${number(splitting.least)}`;
    const none = `No relative: no cosine of ${number(splitting.least)} or more.`;
    const node = card(el("h3", {}, "In smaller and larger dictionaries"),
      ...(rows.length ? [...rows.map((row) => line(row, words, rows[0][0], f.id)),
        note(`Size, number, tokens that it fires on; ${about}.`)] : [note(none)]));
    node.id = "family";
    return node;
  }

  Object.assign(dashboard, { family });
})(window.dashboard);
