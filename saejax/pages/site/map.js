"use strict";
// All features as points; those that the search finds stand out. Hover names the nearest point, a click opens it.
((dashboard) => {
  const { el, marked, link, data, loadMap, showTip, failed } = dashboard;
  const MARGIN = 6, REACH = 12, LARGEST = 9999; // pixels, pixels, of the places in the file

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);

  function map() {
    const canvas = el("canvas", { id: "map", role: "img", "aria-label": "Features by likeness of their decoder directions" });
    let places = null, found = [], searched = false;

    function at(i) {
      const along = (axis, length) => MARGIN + places[axis][i] / LARGEST * (length - 2 * MARGIN);
      return [along(0, canvas.clientWidth), along(1, canvas.clientHeight)];
    }

    function paint() {
      if (!places || !canvas.isConnected) return;
      const { list } = data, scale = devicePixelRatio || 1, g = canvas.getContext("2d");
      canvas.width = canvas.clientWidth * scale;
      canvas.height = canvas.clientHeight * scale;
      g.scale(scale, scale);
      const dots = (features, size, fill, alpha) => {
        [g.fillStyle, g.globalAlpha] = [fill, alpha];
        for (const i of features) {
          const [x, y] = at(i);
          g.fillRect(x - size / 2, y - size / 2, size, size);
        }
      };
      const behind = [...places[0].keys()].filter((i) => searched || i >= list.ready || !list.fired[i]);
      dots(behind, 2, colour("--bar"), searched ? 0.25 : 0.7);
      const alive = found.filter((i) => list.fired[i]);
      dots(alive, searched ? 4 : 2.5, colour(searched ? "--i9" : "--i5"), 0.8);
    }

    // The nearest feature within reach, or -1.
    function under(event) {
      const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
      let best = -1, least = REACH ** 2;
      for (let i = 0; places && i < data.list.ready; i++) {
        const [a, b] = at(i), distance = (a - x) ** 2 + (b - y) ** 2;
        if (distance < least) [least, best] = [distance, i];
      }
      return best;
    }

    canvas.addEventListener("pointermove", (event) => {
      const i = under(event), { list } = data;
      canvas.dataset.tip = i < 0 ? "" : `${i}  ${list.said.get(i) || list.tokens[i].map(marked).join(" ")}`;
      canvas.style.cursor = i < 0 ? "default" : "pointer";
      showTip(event);
    });
    canvas.addEventListener("click", (event) => {
      const i = under(event);
      if (i >= 0) location.hash = link(i);
    });
    new ResizeObserver(paint).observe(canvas);
    loadMap().then((read) => {
      places = read;
      canvas.dataset.ready = "yes";
      paint();
    }).catch(failed);
    canvas.show = (features, isSearch) => {
      [found, searched] = [features, isSearch && features.length < data.list.ready];
      paint();
    };
    return canvas;
  }

  Object.assign(dashboard, { map });
})(window.dashboard);
