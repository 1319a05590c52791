"use strict";
// The page of one feature: charts, examples by interval, tokens, neighbours.
((dashboard) => {
  const { main, el, card, note, figures, number, count, percent, marked, word, link, data, loadFeature } = dashboard;
  const OPEN = 4; // groups of examples

  function example(e, words, f) {
    const [, value, context, position, start, tokens, sparse] = e, acts = new Map();
    for (let i = 0; i < sparse.length; i += 2) acts.set(sparse[i], sparse[i + 1]);
    const text = tokens.map((w, i) => token(words[w], acts.get(i) || 0, start + i, position, f));
    const where = el("div", { class: "where" }, `${number(value)} \u00b7 context ${context}, token ${position}`);
    return el("div", { class: "ex" }, where, el("div", { class: "text" }, ...text));
  }

  function token(text, act, place, peak, f) {
    const node = el("span", { class: place === peak ? "tok peak" : "tok" }, text);
    if (act > 0) node.style.setProperty("--a", (0.12 + 0.78 * Math.min(1, act / f.max)).toFixed(3));
    node.dataset.tip = `${marked(text)}  \u2192  ${act > 0 ? number(act) : "0"}  (token ${place})`;
    return node;
  }

  // Top contexts, then the intervals from the highest to the lowest.
  function groups(f, words) {
    const { intervals } = data.meta, by = new Map();
    for (const e of f.examples) by.set(e[0], [...(by.get(e[0]) || []), e]);
    const order = [0, ...Array.from({ length: intervals }, (_, i) => intervals - i)];
    return order.flatMap((interval, place) => {
      const found = by.get(interval);
      if (!found) return [];
      return [el("details", { open: place < OPEN, "data-interval": interval }, summary(f, interval, found.length),
        ...found.map((e) => example(e, words, f)))];
    });
  }

  function summary(f, interval, shown) {
    const { intervals } = data.meta;
    const says = (title, text, chip) => el("summary", {}, chip, title, el("span", { class: "soft" }, text));
    if (interval === 0) return says("Top contexts", ", each at its highest token", null);
    const bound = (i) => number(f.max * i / intervals), about = Math.max(shown, f.interval_counts[interval - 1]);
    return says(`${bound(interval - 1)} to ${bound(interval)}`,
      ` \u00b7 interval ${interval} of ${intervals} \u00b7 about ${count(about)} activations, ${shown} at random`,
      el("span", { class: `chip i${interval}` }));
  }

  function pairs(rows) {
    return el("div", { class: "rows" }, ...rows.flatMap(([left, right]) => [
      el("div", {}, left), el("div", { class: "v" }, right)]));
  }

  function near(title, about, rows, none = "none found") {
    const lines = rows.map(([feature, text, score]) => [
      el("a", { href: link(feature) }, `${feature} `, text ? word(text) : ""), number(score)]);
    return card(el("h3", {}, title), lines.length ? pairs(lines) : note(none), note(about));
  }

  function effects(f, words) {
    if (!f.up.length) return "";
    const up = f.up.map(([w, v]) => [word(words[w]), `+${number(v)}`]);
    const down = f.down.map(([w, v]) => [word(words[w]), number(v)]);
    return el("div", { class: "card", id: "logits" }, el("h3", {}, "Effect on the next token"),
      el("div", { class: "two" }, pairs(up), pairs(down)),
      note("Direction through final norm and unembedding, per unit of activation."));
  }

  function firesOn(f, words) {
    const rows = f.tokens.map(([w, share, mean]) => [word(words[w]), `${percent(share)} \u00b7 ${number(mean)}`]);
    return card(el("h3", {}, "Fires on"), pairs(rows),
      note("share of its total activation, estimated from a sample \u00b7 mean there"));
  }

  function charts(f) {
    return el("div", { class: "grid" },
      card(el("h3", {}, "Activations"), dashboard.linearChart(f), note("Equal bins, coloured by tenths of the maximum.")),
      card(el("h3", {}, "Activations, logarithmic bins"), dashboard.logChart(f),
        note("Four bins an octave; the first holds all that is lower.")));
  }

  function facts(f) {
    return figures([
      ["fires on", `${percent(f.density)} of tokens`], ["tokens", `${count(f.fired)} of ${count(data.meta.rows)}`],
      ["max", number(f.max)], ["mean when active", number(f.mean)], ["decoder norm", number(f.decoder_norm)],
      ["encoder norm", number(f.encoder_norm)], ["bias", number(f.bias)]]);
  }

  function body(f, words) {
    const cosine = near("Nearest by decoder", "cosine of the decoder directions", f.cosine,
      data.meta.neighbours === "all" ? "none found" : `not in this index: saejax search like SAE ${f.id} finds them`);
    if (f.fired === 0) return [facts(f), el("div", { class: "grid" }, effects(f, words), cosine)];
    const firing = near("Fires together with", "correlation of firing, estimated from shared sampled tokens", f.firing);
    return [facts(f), el("div", { class: "layout" },
      el("div", {}, charts(f), el("h2", {}, "Examples"), ...groups(f, words)),
      el("div", { class: "side" }, firesOn(f, words), effects(f, words), dashboard.family(f, words), cosine, firing))];
  }

  function ways(id) {
    const last = data.meta.features - 1;
    return el("div", { class: "nav" }, id > 0 ? el("a", { href: link(id - 1), rel: "prev" }, "\u2190 previous") : null,
      id < last ? el("a", { href: link(id + 1), rel: "next" }, "next \u2192") : null,
      el("a", { href: "#", id: "all" }, "all features"));
  }

  async function feature(id, y) {
    const f = await loadFeature(id);
    if (new URLSearchParams(location.hash.slice(1)).get("feature") !== String(id)) return; // left meanwhile
    const title = el("h1", {}, `Feature ${id}`, f.said ? el("small", { id: "said" }, f.said) : null);
    const dead = `Dead: this feature fired on none of the ${count(data.meta.rows)} tokens that were indexed. `
      + "There are no examples.";
    const notice = f.fired === 0 ? el("p", { class: "notice", id: "dead-notice" }, dead) : "";
    main.replaceChildren(ways(id), title, notice, ...body(f, f.words));
    document.title = `Feature ${id} - ${data.meta.title}`;
    scrollTo(0, y);
    main.focus({ preventScroll: true });
  }

  Object.assign(dashboard, { feature });
})(window.dashboard);
