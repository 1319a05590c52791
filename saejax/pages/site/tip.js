"use strict";
// The text beside the pointer, of whatever has a `data-tip`.
((dashboard) => {
  const tip = document.getElementById("tip");

  const hideTip = () => { tip.hidden = true; };

  function showTip(event) {
    const target = event.target.closest ? event.target.closest("[data-tip]") : null;
    if (!target || !target.dataset.tip) { hideTip(); return; }
    tip.textContent = target.dataset.tip;
    tip.hidden = false;
    place(target, event);
  }

  // Above the element, or below it where there is no room; in the map above the pointer.
  function place(target, event) {
    const box = target.getBoundingClientRect(), own = tip.getBoundingClientRect(), inMap = target.id === "map";
    const left = (event.clientX || box.left) - own.width / 2;
    const top = inMap ? event.clientY - 6 : box.top, bottom = inMap ? event.clientY + 12 : box.bottom;
    tip.style.left = `${Math.max(4, Math.min(innerWidth - own.width - 4, left))}px`;
    tip.style.top = `${top > own.height + 60 ? top - own.height - 6 : bottom + 6}px`;
  }

  for (const name of ["pointerover", "click"]) document.addEventListener(name, showTip);
  addEventListener("scroll", hideTip, { passive: true });

  Object.assign(dashboard, { showTip, hideTip });
})(window.dashboard);
