// Pages that read a script, and lines of code on any page. Without this file everything can be
// read; with it names light up, cards say what is known of them, and a jump has a way back.

(() => {
  "use strict";
  const bar = document.querySelector(".reader-bar");
  const reader = document.querySelector(".reader");
  const chinese = document.documentElement.lang.startsWith("zh");

  // ---- Lines: unfold what is called, and a way back ---------------------------------------------

  function backLink() {
    if (document.querySelector(".way-back")) return;
    const link = document.createElement("a");
    link.className = "way-back";
    link.href = "#";
    link.textContent = chinese ? "← 返回" : "← Back";
    link.addEventListener("click", (event) => {
      event.preventDefault();
      link.remove();
      history.back();
    });
    document.body.append(link);
  }

  /** What "PPO only" leaves out. */
  const LEFT_OUT = ".reader ~ .step, .part:not([data-ppo]), .row:not([data-ppo]), .fold";

  function showTarget() {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    const row = target.closest(".row");
    const box = document.getElementById("ppo-only");
    let folded = Boolean(box?.checked && target.closest(LEFT_OUT));
    if (folded) box.click();
    for (let fold = target.closest("details"); fold; fold = fold.parentElement.closest("details")) {
      folded ||= !fold.open;
      fold.open = true;
    }
    if (folded || row) target.scrollIntoView();
  }

  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href*='#']");
    if (!link || link.dataset.line || link.closest(".reader-bar, .md-nav, .md-header")) return;
    if (link.pathname !== location.pathname) sessionStorage.jumpedTo = link.href;
    else if (link.hash.length > 1) setTimeout(backLink);
  });
  window.addEventListener("hashchange", showTarget);
  showTarget();
  if (/^#L-\d+$/.test(location.hash) && sessionStorage.jumpedTo === location.href) backLink();
  if (!reader) return;

  // ---- PPO only ---------------------------------------------------------------------------------

  const box = document.getElementById("ppo-only");
  if (reader.querySelector("[data-ppo]")) box.parentElement.hidden = false;
  const applySwitch = () => document.body.classList.toggle("ppo-only", box.checked);
  box.addEventListener("change", applySwitch);
  applySwitch(); // a reload may keep the box as it was
  window.addEventListener("pageshow", applySwitch); // so does the way back to this page

  const contents = bar.querySelector(".contents");
  contents.addEventListener("click", (event) => {
    if (!event.target.closest("a")) return;
    contents.open = false;
    const id = decodeURIComponent(event.target.hash.slice(1));
    const part = document.getElementById(id)?.closest(".part");
    if (box.checked && part && !part.dataset.ppo) box.click();
  });
  document.addEventListener("click", (event) => {
    if (!event.target.closest(".contents")) contents.open = false;
  });

  // ---- Names light up, and have a card ----------------------------------------------------------

  const cards = JSON.parse(document.getElementById("cards").textContent);
  const labels = JSON.parse(bar.dataset.labels);
  const known = (name) => Object.hasOwn(cards, name);
  let card = null;
  let owner = null;
  let closing = 0;

  // In the code, the first place of each known name can be reached by the keyboard.
  const reached = new Set();
  for (const token of reader.querySelectorAll(".code [data-name]")) {
    if (!known(token.dataset.name)) continue;
    token.classList.add("known");
    if (reached.has(token.dataset.name)) continue;
    reached.add(token.dataset.name);
    token.tabIndex = 0;
  }

  function light(element) {
    dim();
    const row = element.closest(".row");
    const names = element.dataset.name.split(" "); // of a symbol, the code may have two
    const same = names.map((name) => `[data-name~="${CSS.escape(name)}"]`).join();
    for (const twin of row ? row.querySelectorAll(same) : [element]) twin.classList.add("lit");
  }

  function dim() {
    for (const element of document.querySelectorAll(".lit")) element.classList.remove("lit");
  }

  function make(tag, parent, content = "") {
    const element = document.createElement(tag);
    element.innerHTML = content; // made when the site was built, from its own sources
    parent.append(element);
    return element;
  }

  const escape = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");

  function fill(name) {
    const facts = cards[name];
    const box = document.createElement("div");
    box.className = "name-card";
    box.setAttribute("role", "tooltip");
    box.id = "name-card";
    make("p", box, `<b>${name}</b> ${(facts.symbol || []).join(", ")}`);
    if (facts.meaning) make("p", box, facts.meaning);
    const list = make("dl", box);
    const add = (label, content) => {
      make("dt", list, labels[label]);
      make("dd", list, content);
    };
    for (const [shape, place] of facts.shape || []) {
      add("shape", `<code>${escape(shape)}</code>${place && ` ${labels.in} <code>${place}</code>`}`);
    }
    if (facts.flag) add("flag", `<code class="flag">${facts.flag}</code> ${escape(facts.help)}`);
    if (facts.flag) add("default", `<code>${escape(facts.default)}</code>`);
    if (facts.line) {
      add("defined", `<a href="#L-${facts.line}">${labels.line.replace("{}", facts.line)}</a>`);
    }
    const effects = (facts.effects || []).map(([text, link]) => `<a href="${link}">${text}</a>`);
    if (effects.length) add("effect", effects.join("<br>"));
    return box;
  }

  function open(element) {
    clearTimeout(closing);
    if (owner === element) return;
    close();
    light(element);
    owner = element;
    const name = element.dataset.name.split(" ").find(known);
    if (!name) return;
    card = fill(name);
    element.closest(".md-content__inner").append(card);
    element.setAttribute("aria-describedby", card.id);
    const place = element.getBoundingClientRect();
    const size = card.getBoundingClientRect();
    const below = place.bottom + 6 + size.height < innerHeight;
    // Within the note's column, so that it does not cover the code.
    const column = element.closest(".note")?.getBoundingClientRect().right;
    const left = Math.min(place.left, (column ?? document.documentElement.clientWidth - 8) - size.width);
    card.style.left = `${Math.max(8, left)}px`;
    card.style.top = `${below ? place.bottom + 6 : Math.max(8, place.top - size.height - 6)}px`;
    card.addEventListener("pointerenter", () => clearTimeout(closing));
    card.addEventListener("pointerleave", later);
    card.addEventListener("focusout", (event) => {
      if (!card?.contains(event.relatedTarget)) later();
    });
  }

  function close() {
    clearTimeout(closing);
    dim();
    owner?.removeAttribute("aria-describedby");
    card?.remove();
    card = owner = null;
  }

  function later() {
    clearTimeout(closing);
    closing = setTimeout(close, 250);
  }

  // A link around the code takes the focus in its place.
  const nameAt = (target) =>
    target.closest?.("[data-name]") ?? target.closest?.("a")?.querySelector(":scope > [data-name]");

  reader.addEventListener("pointerover", (event) => {
    const element = event.pointerType === "mouse" && nameAt(event.target);
    if (element) open(element);
  });
  reader.addEventListener("pointerout", (event) => {
    if (event.pointerType === "mouse" && nameAt(event.target)) later();
  });
  reader.addEventListener("focusin", (event) => {
    const element = nameAt(event.target);
    if (element) open(element);
  });
  reader.addEventListener("focusout", (event) => {
    if (!card?.contains(event.relatedTarget)) later();
  });
  reader.addEventListener("click", (event) => {
    const element = nameAt(event.target);
    if (element) open(element);
  });
  document.addEventListener("click", (event) => {
    if (!nameAt(event.target) && !card?.contains(event.target)) close();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && owner) {
      const element = owner;
      const inside = card?.contains(document.activeElement);
      close();
      if (inside) element.focus({ focusVisible: true });
      close();
    } else if (event.key === "Enter" && card && document.activeElement === owner) {
      card.querySelector("a")?.focus();
    }
  });
  const closeUnlessFocused = () => {
    const focused = owner?.closest(":focus-visible") && owner; // Tab itself may have scrolled
    close();
    if (focused) open(focused);
  };
  document.addEventListener("scroll", closeUnlessFocused, { passive: true });
})();
