// What a page can do beyond being read; without this script everything is shown.
(() => {
  "use strict";
  const root = document.documentElement;
  const all = (selector, at = document) => [...at.querySelectorAll(selector)];
  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    Object.entries(attributes).forEach(([name, value]) => node.setAttribute(name, value));
    node.append(...children);
    return node;
  };

  // One switch a page for its code; the page remembers it.
  function codeSwitch() {
    if (!document.querySelector(".tag_code-hidden .code")) return;
    const key = "show-code:" + location.pathname;
    const button = make("button", { type: "button", class: "btn btn-sm code-switch" });
    const tell = () => {
      const on = root.classList.contains("show-code");
      button.textContent = on ? "hide code" : "show code";
      button.setAttribute("aria-pressed", on);
    };
    button.addEventListener("click", () => {
      const on = root.classList.toggle("show-code");
      on ? localStorage.setItem(key, "1") : localStorage.removeItem(key);
      tell();
    });
    tell();
    const bar = document.querySelector(".article-header-buttons");
    bar ? bar.prepend(button) : document.querySelector("h1").after(button);
  }

  // A figure at full size, inside its own frame.
  function fullSize() {
    all("figure a.full-size").forEach((link) => {
      link.setAttribute("role", "button");
      link.addEventListener("click", (event) => {
        event.preventDefault();
        const figure = link.closest("figure");
        const on = figure.classList.toggle("full");
        link.textContent = on ? "fit to the page" : "full size";
        const plot = figure.querySelector(".plot");
        if (on) plot.parentElement.setAttribute("tabindex", 0);
      });
      link.addEventListener("keydown", (event) => {
        if (event.key === " ") { event.preventDefault(); link.click(); }
      });
    });
  }

  // "Predict first": a guess reveals the figure that answers it.
  function predictions() {
    all(".admonition.predict").forEach((box, number) => {
      const hidden = all(".tag_answer").filter((cell) => cell.compareDocumentPosition(box) & 2);
      const mine = box.id || "prediction" + number;
      const form = make("form", { class: "predict" });
      all("li", box).forEach((item, i) => {
        const words = item.querySelector("p") || item;
        const label = make("label", {}, make("input", { type: "radio", name: mine, value: i }), " ", ...words.childNodes);
        form.append(label);
      });
      const list = box.querySelector("ul, ol");
      if (!list || !hidden.length) return;
      const button = make("button", { type: "submit", class: "btn btn-sm" }, "show what came out");
      const said = make("output", { "aria-live": "polite" });
      form.append(button, said);
      list.replaceWith(form);
      const show = (on) => hidden.forEach((cell) => cell.classList.toggle("waiting", !on));
      show(false);
      form.addEventListener("submit", (event) => {
        event.preventDefault();
        const chosen = form.querySelector("input:checked");
        if (!chosen) { said.textContent = "Choose one first."; return; }
        show(true);
        said.textContent = "Your guess: " + chosen.parentElement.textContent.trim().replace(/\.$/, "") + ". Below is what came out.";
        button.hidden = true;
        hidden[0].scrollIntoView({ block: "center" });
      });
      document.addEventListener("lottery:reveal", () => show(true));
    });
  }

  // The scorecard's filter; its state stands in the address.
  function claimsFilter() {
    const form = document.querySelector("form.claims-filter");
    if (!form) return;
    form.hidden = false;
    const rows = all("[data-verdict]").map((row) => ({ row, text: row.textContent.toLowerCase() }));
    const fields = ["paper", "verdict", "evidence", "primary", "q"];
    const read = () => Object.fromEntries([...new FormData(form)].filter(([, value]) => value));
    const apply = () => {
      const wanted = read(), words = (wanted.q || "").toLowerCase().split(/\s+/).filter(Boolean);
      const any = Object.keys(wanted).length > 0;
      let n = 0;
      rows.forEach(({ row, text }) => {
        const on = ["paper", "verdict", "evidence", "primary"].every((f) => !wanted[f] || row.dataset[f] === wanted[f])
          && words.every((word) => text.includes(word));
        row.hidden = !on;
        n += on;
      });
      all("details.untested").forEach((box) => {
        const left = all("li:not([hidden])", box).length;
        box.hidden = !left;
        box.open = any && left > 0 && left <= 40;
      });
      all("table.claims").forEach((table) => { table.hidden = !table.querySelector("tbody tr:not([hidden])"); });
      all("section.item").forEach((item) => { item.hidden = any && !item.querySelector("[data-verdict]:not([hidden])"); });
      all("section.paper").forEach((paper) => { paper.hidden = !paper.querySelector("section.item:not([hidden])"); });
      form.querySelector("output").textContent = `${n} of ${rows.length} claims`;
    };
    const write = () => {
      const hash = new URLSearchParams(read()).toString();
      history.replaceState(null, "", hash ? "#" + hash : location.pathname + location.search);
      apply();
    };
    const restore = () => {
      const hash = location.hash.slice(1);
      if (hash.includes("=")) {
        const given = new URLSearchParams(hash);
        fields.forEach((name) => {
          const field = form.elements[name];
          if (field.type === "checkbox") field.checked = given.has(name);
          else field.value = given.get(name) || "";
        });
        apply();
      } else if (hash) {
        form.reset();
        apply();
        reach(hash);
      } else apply();
    };
    form.addEventListener("input", write);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(write));
    addEventListener("hashchange", restore);
    restore();
  }

  // A permalink opens the folds around what it names.
  function reach(hash) {
    const target = document.getElementById(decodeURIComponent(hash));
    if (!target) return;
    for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    target.scrollIntoView({ block: "start" });
  }

  // Sphinx marks searched words in SVG by boxes, which titles have not.
  if (!SVGElement.prototype.getBBox) SVGElement.prototype.getBBox = () => new DOMRect();

  // Hidden code is no excerpt of a search result.
  function search() {
    if (typeof Search === "undefined" || !Search.htmlToText) return;
    const plain = Search.htmlToText;
    Search.htmlToText = (text, anchor) => {
      const page = new DOMParser().parseFromString(text, "text/html");
      all(".code, svg, .badge, .widget", page).forEach((node) => node.remove());
      return plain(page.documentElement.outerHTML, anchor);
    };
  }

  // In print every fold is open.
  addEventListener("beforeprint", () => {
    all("details").forEach((box) => { if (!box.open) { box.open = true; box.dataset.printed = 1; } });
    document.dispatchEvent(new Event("lottery:reveal"));
  });
  addEventListener("afterprint", () => all("details[data-printed]").forEach((box) => {
    box.open = false;
    delete box.dataset.printed;
  }));

  codeSwitch();
  fullSize();
  predictions();
  claimsFilter();
  search();
  if (location.hash && !location.hash.includes("=")) reach(location.hash.slice(1));
  addEventListener("hashchange", () => { if (!location.hash.includes("=")) reach(location.hash.slice(1)); });
})();
