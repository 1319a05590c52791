"use strict";
// Draws what the address asks for: `#feature=3`, or the list as `#q=text&sort=max&dir=-1&page=2&dead=1`.
(({ main, el, data, loadMeta, hideTip, front, stateOf, feature, failed }) => {
  // Where an address was scrolled to is kept in its entry of the history: the browser would restore it before the list is there.
  history.scrollRestoration = "manual";
  let timer = 0;
  const remember = () => history.replaceState({ y: scrollY }, "");
  addEventListener("scroll", () => {
    clearTimeout(timer);
    timer = setTimeout(remember, 150);
  }, { passive: true });
  addEventListener("pagehide", remember);
  document.addEventListener("click", () => { if (data.meta) remember(); }, true);

  function route() {
    hideTip();
    clearTimeout(timer);
    const y = history.state?.y || 0;
    const { meta } = data, asked = new URLSearchParams(location.hash.slice(1));
    if (!asked.has("feature")) {
      document.title = `${meta.title} - features`;
      front(stateOf(asked), y);
      return;
    }
    const number = asked.get("feature"), id = /^\d+$/.test(number) ? Number(number) : NaN;
    if (id < meta.features) feature(id, y).catch(failed);
    else noSuch(number.slice(0, 20), meta.features - 1);
  }

  function noSuch(number, last) {
    const notice = `There is no feature ${number}: they are numbered 0 to ${last}.`;
    main.replaceChildren(el("p", { class: "notice", id: "no-such" }, notice), el("a", { href: "#" }, "all features"));
  }

  document.getElementById("go").addEventListener("submit", (event) => {
    event.preventDefault();
    const number = document.getElementById("number").value.trim();
    if (number) location.hash = `feature=${encodeURIComponent(number)}`;
  });
  addEventListener("popstate", () => { if (data.meta) route(); });
  loadMeta().then(route).catch(failed);
})(window.dashboard);
