"use strict";
// All features as points; those that the search finds stand out. Hover names the nearest point, a click opens it.
((dashboard) => {
  const { el, marked, link, data, loadMap, hasLines, readLines, textsOf, showTip, failed } = dashboard;
  const MARGIN = 6, REACH = 12, LARGEST = 9999; // pixels, pixels, of the places in the file

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);

  function map() {
    const canvas = el("canvas", { id: "map", role: "img", "aria-label": "Features by likeness of their decoder directions" });
    let places = null, isFound = new Uint8Array(0), searched = false;

    // Where a point is: they are numbered by themselves, as not every feature has one.
    function at(point) {
      const along = (axis, length) => MARGIN + places[axis][point] / LARGEST * (length - 2 * MARGIN);
      return [along("x", canvas.clientWidth), along("y", canvas.clientHeight)];
    }

    function paint() {
      if (!places || !canvas.isConnected) return;
      const { list } = data, scale = devicePixelRatio || 1, g = canvas.getContext("2d");
      canvas.width = canvas.clientWidth * scale;
      canvas.height = canvas.clientHeight * scale;
      g.scale(scale, scale);
      const dots = (points, size, fill, alpha) => {
        [g.fillStyle, g.globalAlpha] = [fill, alpha];
        for (const point of points) {
          const [x, y] = at(point);
          g.fillRect(x - size / 2, y - size / 2, size, size);
        }
      };
      const points = places.feature.map((_, point) => point);
      const lit = (point) => isFound[places.feature[point]] && list.density[places.feature[point]] > 0;
      dots(points.filter((point) => searched || !lit(point)), 2, colour("--bar"), searched ? 0.25 : 0.7);
      dots(points.filter(lit), searched ? 4 : 2.5, colour(searched ? "--i9" : "--i5"), 0.8);
    }

    // The feature of the nearest point within reach, or -1.
    function under(event) {
      const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
      let best = -1, least = REACH ** 2;
      for (let point = 0; places && point < places.feature.length; point++) {
        const [a, b] = at(point), distance = (a - x) ** 2 + (b - y) ** 2;
        if (distance < least) [least, best] = [distance, places.feature[point]];
      }
      return best;
    }

    const name = (i) => (hasLines([i]) ? `${i}  ${data.list.said.get(i) || textsOf("tokens", i).map(marked).join(" ")}` : `${i}`);

    function say(i, event) {
      canvas.dataset.tip = i < 0 ? "" : name(i);
      showTip(event);
    }

    canvas.addEventListener("pointermove", (event) => {
      const i = under(event);
      canvas.dataset.feature = i;
      canvas.style.cursor = i < 0 ? "default" : "pointer";
      say(i, event);
      if (i < 0 || hasLines([i])) return;
      readLines([i]).then(() => { if (canvas.isConnected && canvas.dataset.feature === String(i)) say(i, event); }).catch(failed);
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
      isFound = new Uint8Array(data.meta.features);
      for (const i of features) isFound[i] = 1;
      searched = isSearch && features.length < data.meta.features;
      paint();
    };
    return canvas;
  }

  Object.assign(dashboard, { map });
})(window.dashboard);
