// The book's movable pictures: plain SVG, see lottery/widgets.py. Without this script the still picture stands.
(() => {
  "use strict";
  const NS = "http://www.w3.org/2000/svg";
  const BLUE = "#0072B2", RED = "#D55E00", GREEN = "#009E73", ORANGE = "#E69F00";
  const make = (tag, attributes = {}, ...children) => {
    const node = tag.startsWith("svg:") ? document.createElementNS(NS, tag.slice(4)) : document.createElement(tag);
    Object.entries(attributes).forEach(([name, value]) => node.setAttribute(name, value));
    node.append(...children);
    return node;
  };
  const picture = (width, height) => make("svg:svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": true });
  const slider = (name, options, change) => {
    const input = make("input", { type: "range", ...options });
    const label = make("label", {}, name + " ", input);
    input.addEventListener("input", () => change(Number(input.value)));
    return { label, input };
  };
  const said = () => make("output", { "aria-live": "polite" });
  const line = (points, attributes) => make("svg:polyline", { points: points.map((p) => p.map((v) => v.toFixed(1)).join()).join(" "), fill: "none", "stroke-width": 2, ...attributes });

  const widgets = {
    pixels(box, { rounds }) {
      const svg = picture(224, 224), out = said();
      const cells = Array.from({ length: 784 }, (_, i) => make("svg:rect", { x: 8 * (i % 28), y: 8 * Math.floor(i / 28), width: 8, height: 8, fill: BLUE }));
      svg.append(...cells);
      const show = (r) => {
        const at = rounds[r], bytes = atob(at.pixels), most = Math.max(...[...bytes].map((c) => c.charCodeAt(0)), 1);
        cells.forEach((cell, i) => cell.setAttribute("fill-opacity", bytes.charCodeAt(i) / most));
        out.textContent = `round ${r}: ${at.left} % of the weights left, ${at.cut} of 784 pixels cut off, test accuracy ${at.accuracy} %`;
      };
      const { label, input } = slider("round", { min: 0, max: rounds.length - 1, value: 0 }, show);
      box.append(svg, label, out);
      show(Number(input.value));
    },

    layers(box, { names, kept }) {
      const steps = Object.keys(kept), methods = Object.keys(kept[steps[0]]), colours = { grasp: GREEN, snip: ORANGE };
      const words = { grasp: "GraSP", snip: "SNIP" };
      const width = 640, height = 190, svg = picture(width, height), out = said();
      const wide = (width - 48) / names.length, y = (v) => 160 - 45 * Math.log10(Math.max(v, 0.1) / 0.1);
      [0.1, 1, 10, 100].forEach((v) => svg.append(make("svg:path", { d: `M44 ${y(v)}H${width}`, stroke: "currentColor", "stroke-opacity": 0.2 }),
        make("svg:text", { x: 40, y: y(v) + 4, "text-anchor": "end", "font-size": 12, fill: "currentColor" }, `${v} %`)));
      svg.append(make("svg:text", { x: width / 2, y: 182, "text-anchor": "middle", "font-size": 12, fill: "currentColor" }, "layer, from the first to the classifier"));
      const dots = methods.map((m, k) => names.map((name, i) => {
        const dot = make("svg:circle", { cx: 48 + (i + 0.3 + 0.4 * k) * wide, r: Math.min(4, wide / 4), fill: colours[m] || BLUE });
        svg.append(dot);
        return dot;
      }));
      const show = (k) => {
        const at = kept[steps[k]];
        methods.forEach((m, j) => at[m].forEach((v, i) => dots[j][i].setAttribute("cy", y(v))));
        const least = methods.map((m) => { const v = Math.min(...at[m]); return `${words[m] || m} keeps least in ${names[at[m].indexOf(v)]}: ${v} %`; });
        out.textContent = `${steps[k]} % removed. ${least.join("; ")}`;
      };
      const { label } = slider("sparsity", { min: 0, max: steps.length - 1, value: 0 }, show);
      const key = make("p", { class: "widget-key" });
      methods.forEach((m) => { const dot = make("span", { "aria-hidden": true }, "● "); dot.style.color = colours[m] || BLUE; key.append(dot, (words[m] || m) + " "); });
      box.append(key, svg, label, out);
      show(0);
    },

    gate(box, { s }) {
      const svg = picture(360, 190), out = said();
      const x = (v) => 180 + 150 * v, y = (v) => 160 - 140 * v, sigma = (v) => 1 / (1 + Math.exp(-v));
      svg.append(make("svg:path", { d: `M30 ${y(0)}H330M30 ${y(1)}H330M180 ${y(0)}V${y(1)}`, stroke: "currentColor", "stroke-opacity": 0.3 }));
      [["0", 22, y(0) + 4], ["1", 22, y(1) + 4], ["s", 335, y(0) + 4]].forEach(([t, a, b]) => svg.append(make("svg:text", { x: a, y: b, "font-size": 12, fill: "currentColor" }, t)));
      const curve = line([], { stroke: BLUE });
      const dots = s.map((v) => make("svg:circle", { cx: x(v), r: 5, fill: RED }));
      svg.append(curve, ...dots);
      const show = (k) => {
        const beta = 200 ** (k / 100), values = s.map((v) => sigma(beta * v));
        curve.setAttribute("points", Array.from({ length: 121 }, (_, i) => -1 + i / 60).map((v) => `${x(v).toFixed(1)},${y(sigma(beta * v)).toFixed(1)}`).join(" "));
        dots.forEach((dot, i) => dot.setAttribute("cy", y(values[i])));
        const open = values.filter((v) => Math.min(v, 1 - v) > 0.01).length;
        out.textContent = `β = ${beta.toFixed(beta < 10 ? 1 : 0)}: gates ${values.map((v) => v.toFixed(2)).join(", ")}; ${open} of ${s.length} undecided`;
      };
      const { label } = slider("β", { min: 0, max: 100, value: 0, "aria-label": "beta, from 1 to 200" }, show);
      box.append(svg, label, out);
      show(0);
    },

    threshold(box, { w }) {
      const svg = picture(360, 210), out = said();
      const x = (v) => 180 + 150 * v, y = (v) => 105 - 90 * v;
      svg.append(make("svg:path", { d: `M30 105H330M180 15V195`, stroke: "currentColor", "stroke-opacity": 0.3 }),
        make("svg:text", { x: 334, y: 109, "font-size": 12, fill: "currentColor" }, "w"));
      const hard = line([], { stroke: RED, "stroke-dasharray": "5 3" }), soft = line([], { stroke: BLUE });
      const dots = w.map((v) => make("svg:circle", { cx: x(v), r: 4.5, fill: BLUE }));
      svg.append(hard, soft, ...dots);
      const S = (v, a) => Math.sign(v) * Math.max(Math.abs(v) - a, 0), H = (v, a) => (Math.abs(v) > a ? v : 0);
      const show = (k) => {
        const a = k / 100, points = (f) => Array.from({ length: 201 }, (_, i) => -1 + i / 100).map((v) => `${x(v).toFixed(1)},${y(f(v, a)).toFixed(1)}`).join(" ");
        soft.setAttribute("points", points(S));
        hard.setAttribute("points", points(H));
        dots.forEach((dot, i) => dot.setAttribute("cy", y(S(w[i], a))));
        const left = w.filter((v) => S(v, a) !== 0);
        out.textContent = `α = ${a.toFixed(2)}: ${left.length} of ${w.length} weights left` + (left.length ? `; the largest, ${Math.max(...left.map(Math.abs)).toFixed(2)}, becomes ${(Math.max(...left.map(Math.abs)) - a).toFixed(2)} (soft) or stays (hard)` : "");
      };
      const { label } = slider("α", { min: 0, max: 95, value: 0, "aria-label": "alpha, from 0 to 0.95" }, show);
      const key = make("p", { class: "widget-key" }, "solid with dots: soft; dashed: hard");
      box.append(key, svg, label, out);
      show(0);
    },

    prune(box, { trainings, rate }) {
      const n = trainings[0].length, grid = make("div", { class: "widget-grid" }), out = said();
      const gone = new Set();
      let round = 0, picked = new Set();
      const buttons = Array.from({ length: n }, (_, i) => {
        const button = make("button", { type: "button", "aria-pressed": false });
        button.addEventListener("click", () => {
          if (gone.has(i)) return;
          picked.has(i) ? picked.delete(i) : picked.add(i);
          draw();
        });
        return button;
      });
      grid.append(...buttons);
      const wanted = () => { const left = n - gone.size; return Math.round(rate * left); };
      const draw = (text) => {
        buttons.forEach((button, i) => {
          button.textContent = gone.has(i) ? "–" : trainings[round][i].toFixed(2).replace("-", "−");
          button.disabled = gone.has(i) || round >= 2;
          button.setAttribute("aria-pressed", picked.has(i));
        });
        out.textContent = text || `Round ${round + 1}: remove the ${wanted()} smallest of ${n - gone.size}; ${picked.size} chosen.`;
      };
      const check = make("button", { type: "button", class: "btn btn-sm" }, "prune");
      check.addEventListener("click", () => {
        const left = trainings[round].map((v, i) => [Math.abs(v), i]).filter(([, i]) => !gone.has(i)).sort((a, b) => a[0] - b[0]);
        const right = new Set(left.slice(0, wanted()).map(([, i]) => i));
        if (picked.size !== right.size) return draw(`Choose ${right.size}; you chose ${picked.size}.`);
        const wrong = [...picked].filter((i) => !right.has(i));
        if (wrong.length) return draw(`${wrong.length} of them ${wrong.length > 1 ? "are" : "is"} not among the smallest: the sign does not count.`);
        picked.forEach((i) => gone.add(i));
        picked = new Set();
        if (round === 0) { round = 1; draw(`Right. The survivors went back to their start and were trained again. Round 2: remove ${wanted()}.`); }
        else { check.disabled = true; draw(`Right: ${n - gone.size} of ${n} weights are the ticket's.`); buttons.forEach((b) => { b.disabled = true; }); }
      });
      box.append(grid, check, out);
      draw();
    },
  };

  document.querySelectorAll(".widget").forEach((box) => {
    const draw = widgets[box.dataset.widget];
    if (!draw) return;
    const controls = make("div", { class: "widget-controls" });
    draw(controls, JSON.parse(box.querySelector('script[type="application/json"]').textContent));
    box.querySelector(".widget-still").replaceWith(controls);
  });
})();
