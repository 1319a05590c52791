"use strict";
// What the list's search finds, the best match first. Blanks count, upper and lower case are one.
((dashboard) => {
  const { data } = dashboard;
  const TOKENS = 100, SAID = 200, LOGITS = 300, NONE = Infinity; // the number itself: 0

  // How well a text fits: 0 the text itself, but for blanks that begin it; 1 begins with it; 2 holds it; NONE.
  function fitting(query) {
    const known = new Map(); // the same tokens come again and again
    return (text) => {
      if (!known.has(text)) {
        const whole = text.toLowerCase(), bare = whole.trimStart();
        const begins = whole.startsWith(query) || bare.startsWith(query);
        known.set(text, whole === query || bare === query ? 0 : begins ? 1 : whole.includes(query) ? 2 : NONE);
      }
      return known.get(text);
    };
  }

  // (feature) -> its place in what is found, the least first: by what it fires on, then by its explanation, then by what it
  // promotes; NONE if it does not fit.
  function ranking(query) {
    const fit = fitting(query), { list } = data;
    const best = (texts) => texts.reduce((least, text, place) => Math.min(least, 10 * fit(text) + place), NONE);
    return (i) => {
      if (!query || String(i) === query.trim()) return 0;
      const on = TOKENS + best(list.tokens[i]);
      if (on < NONE) return on;
      if (` ${list.said.get(i) || ""} `.toLowerCase().includes(query)) return SAID;
      return LOGITS + best(list.logits[i]);
    };
  }

  Object.assign(dashboard, { ranking });
})(window.dashboard);
