// Pointing at a cluster or at its legend entry, focus and click included, shows its score and share.
(() => {
  const show = (target, figure) => {
    const cluster = target?.dataset.cluster;
    figure.classList.toggle("pointed", cluster !== undefined);
    figure.querySelectorAll("[data-cluster]").forEach((part) => {
      part.classList.toggle("on", part.dataset.cluster === cluster);
    });
    const detail = figure.querySelector(".detail");
    const entry = figure.querySelector(`.legend [data-cluster="${cluster}"]`);
    const text = entry ? entry.dataset.label : detail.dataset.hint;
    if (detail.textContent !== text) detail.textContent = text;
  };
  const find = (event) => {
    const figure = event.target.closest?.("figure.clusters");
    return figure && [event.target.closest("[data-cluster]"), figure];
  };
  for (const kind of ["pointerover", "focusin"]) {
    document.addEventListener(kind, (event) => {
      const found = find(event);
      if (found && (found[0] || !found[1].dataset.pinned)) show(found[0] ?? pinned(found[1]), found[1]);
      else if (found) show(pinned(found[1]), found[1]);
    });
  }
  const pinned = (figure) => figure.querySelector(`.legend [data-cluster="${figure.dataset.pinned}"]`);
  for (const kind of ["pointerout", "focusout"]) {
    document.addEventListener(kind, (event) => {
      const found = find(event);
      if (found && !found[1].contains(event.relatedTarget)) show(pinned(found[1]), found[1]);
    });
  }
  // A click, as on a touch screen, keeps a cluster shown; a second one releases it.
  document.addEventListener("click", (event) => {
    const found = find(event);
    if (!found || !found[0]) return;
    const [target, figure] = found;
    if (figure.dataset.pinned === target.dataset.cluster) delete figure.dataset.pinned;
    else figure.dataset.pinned = target.dataset.cluster;
    figure.querySelectorAll(".legend button").forEach((button) => {
      button.setAttribute("aria-pressed", button.dataset.cluster === figure.dataset.pinned);
    });
    show(pinned(figure), figure);
  });
  // A stopped answer is whole for screen readers too.
  document.addEventListener("click", (event) => {
    if (event.target.closest?.("#stop")) {
      setTimeout(() => document.querySelectorAll("#status [aria-busy=true]").forEach((box) => {
        box.setAttribute("aria-busy", "false");
        box.textContent = "Stopped.";
      }), 500);
    }
    // What was asked for comes into view: on a narrow page it would be below.
    const target = event.target.closest?.("#compare") ? "#compared" : event.target.closest?.("#ask") ? "#answer" : null;
    if (target && (target === "#compared" || window.innerWidth < 900)) {
      const into = () => document.querySelector(target)?.scrollIntoView({behavior: "smooth", block: "nearest"});
      setTimeout(into, 400);
      setTimeout(into, 1500);
    }
  });
})();
