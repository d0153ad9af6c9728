"use strict";
const all = (selector, from = document) => [...from.querySelectorAll(selector)];
const one = (selector, from = document) => from.querySelector(selector);
const typing = (event) => event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input:not([type=checkbox]), select, textarea");
const follow = (rel) => one(`a[rel=${rel}]`)?.click();

const predict = (box, visible) => {
  box.checked = visible;
  one(`[data-predicted="${box.dataset.predict}"]`).toggleAttribute("hidden", !visible);
};

// What replaces an element's content is a template of the server's, escaped there.
const load = (element, url, options) => {
  element.setAttribute("aria-busy", "true");
  return fetch(url, options).then((answer) => answer.text().then((text) => {
    if (answer.ok) element.innerHTML = text;
    element.setAttribute("aria-busy", "false");
  }));
};

function overview() {
  for (const place of all("[data-load]")) load(place, place.dataset.load);
}

function browse() {
  const line = one("[data-total]");
  fetch(line.dataset.total).then((answer) => answer.ok && answer.text().then((text) => { one(".total", line).textContent = text; }));
  document.addEventListener("keydown", (event) => {
    if (typing(event)) return;
    if (event.key === "ArrowRight") follow("next");
    if (event.key === "ArrowLeft") follow("prev");
    if (event.key === "/") { one("input[name=text]").focus(); event.preventDefault(); }
  });
}

function image() {
  const photo = one(".photo svg");
  const regions = all(".region[data-region]");
  const parts = (region) => all(`.mask[data-region="${region}"], .disc[data-region="${region}"]`);
  const boxes = all("[data-mask]");
  let chosen = null;

  const light = (region) => {
    photo.classList.toggle("focus", region !== null);
    for (const part of all(".mask, .region[data-region]")) part.classList.toggle("on", part.dataset.region === region);
  };
  const choose = (region, scroll) => {
    chosen = region;
    light(region);
    const row = region === null ? null : one(`#region-${region}`);
    if (row && scroll) row.scrollIntoView({ block: "nearest" });
    if (row && scroll) row.focus({ preventScroll: true });
  };
  const show = (box, visible) => {
    box.checked = visible;
    for (const part of parts(box.dataset.mask)) part.classList.toggle("off", !visible);
  };

  for (const box of boxes) box.addEventListener("change", () => show(box, box.checked));
  for (const box of all("[data-predict]")) box.addEventListener("change", () => predict(box, box.checked));
  for (const button of all("[data-show]")) button.addEventListener("click", () => {
    const wanted = button.dataset.show;
    for (const box of boxes) show(box, wanted === "all" || one(`#region-${box.dataset.mask}`).dataset.outcome === wanted);
  });
  for (const mask of all(".mask")) {
    mask.addEventListener("pointerenter", () => light(mask.dataset.region));
    mask.addEventListener("pointerleave", () => light(chosen));
    mask.addEventListener("click", () => choose(mask.dataset.region, true));
  }
  for (const row of regions) {
    row.addEventListener("pointerenter", () => light(row.dataset.region));
    row.addEventListener("pointerleave", () => light(chosen));
    row.addEventListener("click", () => choose(row.dataset.region, false));
    row.addEventListener("focusin", () => choose(row.dataset.region, false));
  }
  for (const form of all("form.reviews")) saveReview(form);
  document.addEventListener("keydown", (event) => {
    if (typing(event)) return;
    const at = regions.findIndex((row) => row.dataset.region === chosen);
    const step = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1 }[event.key];
    if (step && regions.length) {
      const next = at < 0 ? (step > 0 ? 0 : regions.length - 1) : Math.min(regions.length - 1, Math.max(0, at + step));
      choose(regions[next].dataset.region, true);
      event.preventDefault();
    }
    if (event.key === "ArrowRight") follow("next");
    if (event.key === "ArrowLeft") follow("prev");
    if (event.key === "Escape") choose(null, false);
    if (event.key === "a") { const some = boxes.some((box) => !box.checked); for (const box of boxes) show(box, some); }
    const row = at < 0 ? null : regions[at];
    const box = row && one("[data-mask]", row);
    if (event.key === "x" && box) show(box, !box.checked);
    const second = row && one("[data-predict]", row);
    if (event.key === "p" && second) predict(second, !second.checked);
    const word = { r: "right", w: "wrong" }[event.key];
    if (word && row) one(`form.reviews button[value=${word}]`, row).click();
  });
  const asked = /^#region-(\d+)$/.exec(location.hash);
  if (asked) choose(asked[1], true);
}

function saveReview(form) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const value = event.submitter.getAttribute("aria-pressed") === "true" ? "none" : event.submitter.value;
    const body = new URLSearchParams(new FormData(form));
    body.set("right", value);
    body.set("back", "");
    fetch(form.action, { method: "POST", body }).then((answer) => {
      if (!answer.ok) return form.submit();
      for (const button of all("[aria-pressed]", form)) button.setAttribute("aria-pressed", String(button.value === value));
      one("[value=none]", form)?.remove();
    });
  });
}

function whatif() {
  const form = one("form.sliders");
  const result = one("#result");
  let waiting = null, asked = null;
  const count = () => {
    asked?.abort();
    asked = new AbortController();
    const given = new URLSearchParams([...new FormData(form)].filter(([, value]) => value !== ""));
    load(result, `/whatif/result?${given}`, { signal: asked.signal }).then(() => {
      history.replaceState(null, "", `/whatif?${given}`);
    }).catch((error) => { if (error.name !== "AbortError") throw error; });
  };
  form.addEventListener("input", (event) => {
    const slider = event.target.dataset.for;
    if (slider) form.elements[slider].value = event.target.value;
    else { const own = one(`[data-for="${event.target.name}"]`); own.value = event.target.value || event.target.placeholder; }
    clearTimeout(waiting);
    waiting = setTimeout(count, 150);
  });
  form.addEventListener("submit", (event) => { event.preventDefault(); count(); });
  document.addEventListener("click", (event) => {
    const from = event.target.dataset?.copy;
    if (!from) return;
    navigator.clipboard.writeText(one(`#${from}`).textContent).then(() => { event.target.textContent = "Copied"; });
  });
}

function review() {
  const form = one("form.filters");
  form.elements.subset.addEventListener("change", () => { form.elements.decision.value = "kept"; form.submit(); });
  // So the browser's Back shows the region that was reviewed here, and not the next one.
  const here = one("[data-here]");
  if (here) history.replaceState(null, "", here.dataset.here);
  const box = one("[data-predict]");
  box?.addEventListener("change", () => predict(box, box.checked));
  document.addEventListener("keydown", (event) => {
    if (typing(event)) return;
    const word = { r: "right", w: "wrong" }[event.key];
    if (word) one(`form.reviews button[value=${word}]`)?.click();
    if (event.key === "s") follow("next");
    if (event.key === "u") one("form.undo button")?.click();
    if (event.key === "x") one(".mask")?.classList.toggle("off");
    if (event.key === "p" && box) predict(box, !box.checked);
  });
}

({ overview, browse, image, whatif, review })[document.body.dataset.page]?.();
