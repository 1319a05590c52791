"use strict";
// Bar charts. Heights are logarithmic, so that one token in a million shows.
((dashboard) => {
  const { main, svg, number, count, data } = dashboard;
  const LEFT = 8, BOTTOM = 22, TOP = 14;
  const RAISED = "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079";

  function text(content, place) {
    const node = svg("text", place);
    node.textContent = content;
    return node;
  }

  // bars: [{label, value, kind}], ticks: [[place in bars, text]]
  function chart(bars, ticks, label, narrow) {
    const small = narrow || main.clientWidth < 640;
    const W = small ? 340 : 600, H = small ? 130 : 170;
    const step = (W - 2 * LEFT) / bars.length, most = Math.max(1, ...bars.map((b) => b.value));
    const baseline = svg("line", { class: "axis", x1: LEFT, x2: W - LEFT, y1: H - BOTTOM, y2: H - BOTTOM });
    return svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": label },
      ...bars.flatMap((b, i) => bar(b, LEFT + i * step, step, H, most)), baseline,
      ...ticks.map(([place, content]) => tick(content, LEFT + place * step, W, H)),
      text(`highest bar ${count(most)}, log scale`, { x: W - LEFT, y: 11, "text-anchor": "end" }));
  }

  // The bar, and the area over it that says its label.
  function bar(b, x, step, H, most) {
    const share = b.value <= 0 ? 0 : 0.06 + 0.94 * Math.log(1 + b.value) / Math.log(1 + most);
    const height = (H - BOTTOM - TOP) * share;
    const shown = svg("rect", {
      class: `bar ${b.kind || ""}`, x: (x + 0.5).toFixed(1), width: Math.max(1, step - 1).toFixed(1),
      y: (H - BOTTOM - height).toFixed(1), height: height.toFixed(1),
    });
    const area = svg("rect", { x: x.toFixed(1), width: step.toFixed(1), y: 0, height: H - BOTTOM, fill: "transparent" });
    area.dataset.tip = b.label;
    return [shown, area];
  }

  function tick(content, x, W, H) {
    const anchor = x < 40 ? "start" : x > W - 40 ? "end" : "middle";
    return text(content, { x: x.toFixed(1), y: H - 6, "text-anchor": anchor });
  }

  function power(e) {
    if (e === 0) return "1";
    if (!Number.isInteger(e)) return number(10 ** e);
    return `10${[...String(e)].map((c) => RAISED["-0123456789".indexOf(c)]).join("")}`;
  }

  function densityChart() {
    const { counts, never, log10_edges: edges } = data.meta.histogram;
    const bars = counts.map((value, i) => (
      { value, label: `density ${power(edges[i])} to ${power(edges[i + 1])}: ${count(value)} features` }));
    const dead = { value: never, kind: "i8", label: `never: ${count(never)} features` };
    const ticks = edges.flatMap((e, i) => (Number.isInteger(e) && e > -7 ? [[i + 2, power(e)]] : []));
    return chart([dead, { value: 0, label: "" }, ...bars], [[0, "never"], ...ticks], "Histogram of firing densities");
  }

  // A bar of a feature's activations between two values, in the colour of its tenth of the maximum.
  function activations(f, low, high, value) {
    const { intervals } = data.meta, middle = Math.min(f.max, (low + high) / 2);
    const tenth = Math.min(intervals, Math.max(1, Math.ceil(intervals * middle / f.max)));
    return { value, kind: `i${tenth}`, label: `${number(low)} to ${number(high)}: ${count(value)} tokens` };
  }

  function linearChart(f) {
    const width = f.linear_width, end = Math.min(f.linear.length, Math.ceil(f.max / width));
    const bars = f.linear.slice(0, end).map((value, i) => activations(f, i * width, (i + 1) * width, value));
    const ticks = [[0, "0"], [end / 2, number(end / 2 * width)], [end, number(end * width)]];
    return chart(bars, ticks, "Activations, equal bins", true);
  }

  function logChart(f) {
    const bars = [], ticks = [], n = f.log.length;
    for (let i = n - 1; i >= 0; i--) bars.push(activations(f, i === n - 1 ? 0 : f.log_edges[i + 1], f.log_edges[i], f.log[i]));
    for (let i = n - 2; i > 0; i -= 8) ticks.push([n - i, number(f.log_edges[i])]);
    return chart(bars, ticks, "Activations, logarithmic bins", true);
  }

  Object.assign(dashboard, { densityChart, linearChart, logChart });
})(window.dashboard);
