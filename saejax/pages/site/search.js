"use strict";
// What the list's search finds, the best match first, and its order. Blanks count, upper and lower case are one.
((dashboard) => {
  const { data } = dashboard;
  const TOKENS = 100, SAID = 200, LOGITS = 300, NONE = Infinity; // the number itself: 0

  // How well each word fits: 0 the text itself, but for blanks that begin it; 1 begins with it; 2 holds it; NONE.
  function fitting(query) {
    return Float32Array.from(data.list.words, (text, number) => {
      const whole = text.toLowerCase(), bare = whole.trimStart();
      if (!number || !whole.includes(query)) return NONE;
      return whole === query || bare === query ? 0 : whole.startsWith(query) || bare.startsWith(query) ? 1 : 2;
    });
  }

  // Explanations of a file, one behind the other, so that one look finds the query in all of them; made once.
  const joined = new WeakMap();
  function joinedOf(lines) {
    if (!joined.has(lines)) {
      const texts = lines.map(([, text]) => ` ${text} `.toLowerCase()), ends = [];
      texts.forEach((text, i) => ends.push((ends[i - 1] || 0) + text.length));
      joined.set(lines, { text: texts.join(""), ends });
    }
    return joined.get(lines);
  }

  // Calls `found` with the features of a file whose explanations hold the query.
  function inExplanations(lines, query, found) {
    const { text, ends } = joinedOf(lines);
    let line = 0;
    for (let at = text.indexOf(query); at >= 0; at = text.indexOf(query, at)) {
      while (ends[line] <= at) line++;
      const whole = at + query.length <= ends[line];
      if (whole) found(lines[line][0]);
      at = whole ? ends[line] : at + 1;
    }
  }

  // Of each of the first `ready` features its place in what is found, the least first: by what it fires on, then by its
  // explanation, then by what it promotes; NONE if it does not fit.
  function matches(query, ready) {
    const match = new Float32Array(ready);
    if (!query) return match;
    match.fill(NONE);
    const { list, meta } = data, fit = fitting(query);
    const best = (words, begin) => {
      for (let i = 0, w = 0; i < ready; i++) {
        for (let place = 0; place < meta.shown; place++, w++) {
          const rank = begin + 10 * fit[words[w]] + place;
          if (rank < match[i]) match[i] = rank;
        }
      }
    };
    best(list.tokens, TOKENS);
    best(list.logits, LOGITS);
    for (const lines of list.saidFiles) {
      if (lines) inExplanations(lines, query, (i) => { if (match[i] > SAID) match[i] = SAID; });
    }
    const number = Number(query.trim());
    if (String(number) === query.trim() && number < ready) match[number] = 0;
    return match;
  }

  // Whole numbers whose order is that of the floats.
  function rising(keys, downwards) {
    const bits = new Uint32Array(keys.buffer), flip = downwards ? -1 : 0;
    return bits.map((b) => (b >>> 31 ? ~b : b | 0x80000000) ^ flip);
  }

  // Features by their keys, the least first, or the largest; equal ones stay as they are. Two rounds of counting: by the lower
  // half of the keys, then by the upper.
  function ordered(features, keys, downwards) {
    const bits = rising(keys, downwards);
    let from = features, to = new Uint32Array(features.length);
    for (const shift of [0, 16]) {
      const begin = new Uint32Array(65537);
      for (const i of from) begin[((bits[i] >>> shift) & 0xffff) + 1]++;
      for (let k = 1; k < begin.length; k++) begin[k] += begin[k - 1];
      for (const i of from) to[begin[(bits[i] >>> shift) & 0xffff]++] = i;
      [from, to] = [to, shift ? from : new Uint32Array(features.length)];
    }
    return from;
  }

  Object.assign(dashboard, { matches, ordered });
})(window.dashboard);
