/* The parts of the pages that move. A page has <div class="widget" data-widget="NAME"> with a
   sentence in it for readers without JavaScript; a function of WIDGETS takes its place.
   The mathematics of PPO is in ppo.js. */

(() => {
  "use strict";

  const is_chinese = document.documentElement.lang.startsWith("zh");

  /** Return the words in the language of the page. */
  function words(english, chinese) {
    return is_chinese ? chinese : english;
  }

  // ---- Elements ------------------------------------------------------------------------------

  function element(tag, attributes = {}, ...children) {
    return with_content(document.createElement(tag), attributes, children);
  }

  function svg_element(tag, attributes = {}, ...children) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    return with_content(node, attributes, children);
  }

  function with_content(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  /** Add sliders to a widget; return a function that reads their values, by name.

      Each is {name, label, value} and either {min, max, step} or the list `choices`. */
  function add_sliders(widget, sliders, on_change) {
    const readers = {};
    const controls = element("div", { class: "widget-controls" });
    for (const { name, label, value, choices, min, max, step } of sliders) {
      const range = choices
        ? { min: 0, max: choices.length - 1, step: 1, value: choices.indexOf(value) }
        : { min, max, step, value };
      const input = element("input", { type: "range", name, ...range });
      const output = element("output");
      const read = () => (choices ? choices[input.value] : Number(input.value));
      const show = () => {
        output.textContent = choices ? String(read()) : read().toFixed(2);
        input.setAttribute("aria-valuetext", output.textContent);
      };
      input.addEventListener("input", () => {
        show();
        on_change();
      });
      show();
      readers[name] = read;
      controls.append(element("label", {}, element("span", {}, label), input, output));
    }
    widget.append(controls);
    return () => Object.fromEntries(Object.entries(readers).map(([name, read]) => [name, read()]));
  }

  /** Add named numbers to a widget; return a function that shows their values, by name. */
  function add_numbers(widget, labels) {
    const cells = {};
    const list = element("dl", { class: "widget-numbers" });
    for (const [name, label] of Object.entries(labels)) {
      cells[name] = element("dd", { "data-number": name });
      list.append(element("div", {}, element("dt", {}, label), cells[name]));
    }
    widget.append(list);
    return (values) => {
      for (const [name, value] of Object.entries(values)) {
        cells[name].textContent = typeof value === "number" ? value.toFixed(3) : value;
      }
    };
  }

  /** Add an empty table; return its body. */
  function add_table(widget, header) {
    const body = element("tbody");
    const row = element("tr", {}, ...header.map((x) => element("th", { scope: "col" }, x)));
    const table = element("table", { class: "widget-table" }, element("thead", {}, row), body);
    widget.append(element("div", { class: "widget-scroll" }, table));
    return body;
  }

  /** Add a legend: what each kind of line is. */
  function add_legend(widget, lines) {
    const legend = element("p", { class: "widget-legend" });
    for (const [kind, label] of Object.entries(lines)) {
      const line = svg_element("line", { x1: 0, y1: 5, x2: 26, y2: 5, class: kind });
      const sample = svg_element("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" }, line);
      legend.append(element("span", {}, sample, label));
    }
    widget.append(legend);
  }

  /** Axes in which lines and dots are drawn by their coordinates. */
  class Plot {
    constructor(widget, { x, y, x_ticks, y_ticks, x_label, alt }) {
      Object.assign(this, { x, y });
      this.canvas = svg_element("svg", {
        viewBox: "0 0 360 224",
        class: "widget-plot",
        role: "img",
        "aria-label": alt,
      });
      // What leaves the axes is cut off by an inner canvas.
      const inside = { x: 30, y: 4, width: 326, height: 187, viewBox: "30 4 326 187" };
      this.content = svg_element("svg", inside);
      for (const tick of x_ticks) {
        const at = this.across(tick);
        this.canvas.append(
          svg_element("line", { x1: at, y1: 10, x2: at, y2: 185, class: "grid" }),
          svg_element("text", { x: at, y: 203, "text-anchor": "middle" }, String(tick)),
        );
      }
      for (const tick of y_ticks) {
        const at = this.down(tick);
        this.canvas.append(
          svg_element("line", { x1: 36, y1: at, x2: 350, y2: at, class: "grid" }),
          svg_element("text", { x: 31, y: at + 4, "text-anchor": "end" }, String(tick)),
        );
      }
      const label = svg_element("text", { x: 193, y: 219, "text-anchor": "middle" }, x_label);
      this.canvas.append(label, this.content);
      widget.append(this.canvas);
    }

    across(x) {
      return 36 + ((x - this.x[0]) / (this.x[1] - this.x[0])) * 314;
    }

    down(y) {
      return 185 - ((y - this.y[0]) / (this.y[1] - this.y[0])) * 175;
    }

    clear() {
      this.content.replaceChildren();
    }

    path(points) {
      return points.map(([x, y]) => `${this.across(x).toFixed(1)},${this.down(y).toFixed(1)}`);
    }

    line(points, kind) {
      const path = this.path(points).join(" ");
      this.content.append(svg_element("polyline", { points: path, class: kind }));
    }

    /** Fill what lies between the points and 0. */
    area(points, kind) {
      const [first, last] = [points[0], points[points.length - 1]];
      const path = this.path([[first[0], 0], ...points, [last[0], 0]]).join(" ");
      this.content.append(svg_element("polygon", { points: path, class: kind }));
    }

    /** Draw a function of x, between two ends. */
    curve(f, kind, [from, to] = this.x) {
      this.line(samples(f, from, to), kind);
    }

    /** Draw a dot, at the edge if it lies outside the axes. */
    dot(x, y, kind, r = 5) {
      const within = Math.min(Math.max(y, this.y[0]), this.y[1]);
      const at = { cx: this.across(x), cy: this.down(within) };
      this.content.append(svg_element("circle", { ...at, r, class: kind }));
    }

    text(x, y, content, anchor = "middle") {
      const at = { x: this.across(x), y: this.down(y), "text-anchor": anchor };
      this.content.append(svg_element("text", at, content));
    }
  }

  function samples(f, from, to, count = 160) {
    const xs = Array.from({ length: count + 1 }, (_, i) => from + ((to - from) * i) / count);
    return xs.map((x) => [x, f(x)]);
  }

  // ---- clip: the clipped surrogate of one sample ---------------------------------------------

  const RATIO = words("ratio r", "概率比 r");
  const ADVANTAGE = words("advantage A", "优势 A");

  function clip(widget) {
    const read = add_sliders(
      widget,
      [
        { name: "ratio", label: RATIO, min: 0, max: 2, step: 0.01, value: 1 },
        { name: "advantage", label: ADVANTAGE, min: -1.5, max: 1.5, step: 0.1, value: 1 },
        { name: "clip_coef", label: "clip_coef ε", min: 0.05, max: 0.5, step: 0.05, value: 0.2 },
      ],
      draw,
    );
    const plot = new Plot(widget, {
      x: [0, 2], y: [-3, 3], x_ticks: [0, 0.5, 1, 1.5, 2], y_ticks: [-2, 0, 2],
      x_label: RATIO,
      alt: words("The objective of one sample over its ratio", "一个样本的目标随概率比的变化"),
    });
    add_legend(widget, {
      "grey dashed": "r A",
      "orange dotted": words("clipped term", "裁剪项"),
      "blue thick": words("the min", "两者的 min"),
    });
    const show = add_numbers(widget, {
      unclipped: "r A",
      clipped: "clip(r, 1 − ε, 1 + ε) A",
      surrogate: words("objective", "目标"),
      gradient: words("gradient in r", "对 r 的梯度"),
      verdict: words("the sample", "这个样本"),
    });

    function draw() {
      const { ratio, advantage, clip_coef } = read();
      const at = (r) => ppo.clipped_surrogate(r, advantage, clip_coef);
      const point = at(ratio);
      plot.clear();
      plot.line([[1 - clip_coef, -3], [1 - clip_coef, 3]], "edge");
      plot.line([[1 + clip_coef, -3], [1 + clip_coef, 3]], "edge");
      plot.curve((r) => at(r).surrogate, "blue thick");
      plot.curve((r) => at(r).unclipped, "grey dashed");
      plot.curve((r) => at(r).clipped, "orange dotted");
      plot.dot(ratio, point.surrogate, "red");
      show({ ...point, verdict: verdict(point.gradient) });
    }

    function verdict(gradient) {
      if (gradient > 0) return words("raises r", "使 r 上升");
      if (gradient < 0) return words("lowers r", "使 r 下降");
      return words("has no gradient", "不产生梯度");
    }

    draw();
  }

  // ---- gae: the table of the page, for any gamma and lambda ----------------------------------

  /** Return the last table of the page before an element. */
  function table_before(node) {
    const tables = [...document.querySelectorAll("article table")];
    const before = (table) =>
      table.compareDocumentPosition(node) & Node.DOCUMENT_POSITION_FOLLOWING;
    return tables.filter(before).pop();
  }

  /** Read columns 0 to 5 of the table worked by hand: row, reward, V, next V, two flags. */
  function worked_table(table) {
    const rows = [...table.tBodies[0].rows].map((row) => [...row.cells].map((x) => x.textContent));
    const numbers = (column) => rows.map((row) => Number(row[column]));
    const flags = (column) => rows.map((row) => ["yes", "是"].includes(row[column].trim()));
    return {
      names: rows.map((row) => row[0]),
      rewards: numbers(1),
      values: numbers(2),
      next_values: numbers(3),
      terminated: flags(4),
      done: flags(5),
    };
  }

  function gae(widget) {
    const { names, ...rollout } = worked_table(table_before(widget));
    const read = add_sliders(
      widget,
      [
        { name: "gamma", label: "gamma γ", min: 0, max: 1, step: 0.01, value: 0.5 },
        { name: "gae_lambda", label: "gae_lambda λ", min: 0, max: 1, step: 0.01, value: 0.5 },
      ],
      draw,
    );
    const header = ["row", "reward", "V", "next V", "delta", "A", "return"];
    const chinese = ["行", "奖励", "V", "下一个 V", "delta", "A", "回报"];
    const body = add_table(widget, words(header, chinese));

    function ending(t) {
      if (rollout.terminated[t]) return words("terminated", "终止");
      if (rollout.done[t]) return words("truncated", "截断");
      return t === names.length - 1 ? words("cut off", "被切断") : "";
    }

    function draw() {
      const { deltas, advantages, returns } = ppo.gae({ ...rollout, ...read() });
      body.replaceChildren();
      names.forEach((name, t) => {
        const inputs = [rollout.rewards[t], rollout.values[t], rollout.next_values[t]].map(String);
        const results = [deltas[t], advantages[t], returns[t]].map((x) => x.toFixed(3));
        const cells = [...inputs, ...results].map((x) => element("td", {}, x));
        const first = element("th", { scope: "row" }, name);
        if (ending(t)) first.append(element("br"), element("small", {}, ending(t)));
        const is_end = rollout.done[t] || t === names.length - 1;
        body.append(element("tr", { class: is_end ? "segment-end" : "" }, first, ...cells));
      });
    }

    draw();
  }

  // ---- kl: three estimators of KL(policy, reference) -----------------------------------------

  // Of the log ratio l = log pi - log pi_ref, for samples of pi.
  const KL_ESTIMATORS = {
    k1: (l) => l,
    k2: (l) => l ** 2 / 2,
    k3: (l) => Math.exp(-l) - 1 + l, // (r - 1) - log r, with r = pi_ref / pi
  };

  /** Return mean and standard deviation of values that come with these probabilities. */
  function mean_and_std(values, probabilities) {
    const mean = values.reduce((sum, x, i) => sum + probabilities[i] * x, 0);
    const variance = values.reduce((sum, x, i) => sum + probabilities[i] * (x - mean) ** 2, 0);
    return { mean, std: Math.sqrt(variance) };
  }

  function kl(widget) {
    const range = { min: 0.02, max: 0.98, step: 0.01 };
    const policy_label = words("policy's π(yes)", "策略的 π(是)");
    const reference_label = words("reference's π(yes)", "参考模型的 π(是)");
    const read = add_sliders(
      widget,
      [
        { name: "policy", label: policy_label, ...range, value: 0.6 },
        { name: "reference", label: reference_label, ...range, value: 0.5 },
      ],
      draw,
    );
    const plot = new Plot(widget, {
      x: [-4, 4], y: [-2, 6], x_ticks: [-4, -2, 0, 2, 4], y_ticks: [-2, 0, 2, 4, 6],
      x_label: words("log ratio l of the sampled token", "采样词元的对数概率比 l"),
      alt: words("The three estimators over the log ratio", "三个估计量随对数概率比的变化"),
    });
    const kinds = { k1: "grey dashed", k2: "orange dotted", k3: "blue thick" };
    add_legend(widget, {
      [kinds.k1]: "k1 = l",
      [kinds.k2]: "k2 = l² / 2",
      [kinds.k3]: "k3 = e⁻ˡ − 1 + l",
    });
    const show = add_numbers(widget, {
      exact: words("exact KL(policy, reference), nats", "精确的 KL（策略，参考），nat"),
    });
    const english = ["estimator", "mean", "mean − KL", "std"];
    const body = add_table(widget, words(english, ["估计量", "均值", "均值 − KL", "标准差"]));

    function draw() {
      const { policy, reference } = read();
      const pi = [policy, 1 - policy], pi_ref = [reference, 1 - reference];
      const log_ratios = pi.map((p, i) => Math.log(p / pi_ref[i]));
      const exact = mean_and_std(log_ratios, pi).mean;
      plot.clear();
      body.replaceChildren();
      for (const [name, estimate] of Object.entries(KL_ESTIMATORS)) {
        plot.curve(estimate, kinds[name]);
        log_ratios.forEach((l, i) => plot.dot(l, estimate(l), "red", 2 + 5 * Math.sqrt(pi[i])));
        const { mean, std } = mean_and_std(log_ratios.map(estimate), pi);
        const cells = [mean, mean - exact, std].map((x) => element("td", {}, signless(x, 4)));
        body.append(element("tr", {}, element("th", { scope: "row" }, name), ...cells));
      }
      show({ exact: exact.toFixed(4) });
    }

    draw();
  }

  /** Return a number with so many digits, and 0 without a sign. */
  function signless(x, digits) {
    return x.toFixed(digits).replace(/^-(0\.0*)$/, "$1");
  }

  // ---- gauss: a Gaussian policy whose actions are clipped to [-1, 1] --------------------------

  /** Return the standard normal density. */
  function normal_density(z) {
    return Math.exp((-z * z) / 2) / Math.sqrt(2 * Math.PI);
  }

  /** Return P(Z < z) of a standard normal Z, to 1e-12 (Taylor series, Marsaglia 2004). */
  function normal_cdf(z) {
    if (z < -7) return 0;
    if (z > 7) return 1;
    let sum = z, term = z;
    for (let i = 3; Math.abs(term) > 1e-16; i += 2) {
      term *= (z * z) / i;
      sum += term;
    }
    return 0.5 + sum * normal_density(z);
  }

  /** Return what becomes of actions of N(mean, std^2) that are sent clipped to [-1, 1]. */
  function clipped_actions(mean, std) {
    const low = (-1 - mean) / std, high = (1 - mean) / std;
    const below = normal_cdf(low), above = 1 - normal_cdf(high);
    const inside = mean * (1 - below - above) + std * (normal_density(low) - normal_density(high));
    return { below, above, clipped: below + above, mean_sent: inside - below + above };
  }

  function gauss(widget) {
    const read = add_sliders(
      widget,
      [
        { name: "mean", label: words("mean μ", "均值 μ"), min: -2, max: 2, step: 0.05, value: 0 },
        { name: "log_std", label: "log_std, log σ", min: -1, max: 1, step: 0.05, value: 0 },
      ],
      draw,
    );
    const plot = new Plot(widget, {
      x: [-3, 3], y: [0, 1.2], x_ticks: [-3, -2, -1, 0, 1, 2, 3], y_ticks: [0, 0.5, 1],
      x_label: words("action as sampled", "采样得到的动作"),
      alt: words("The density of the policy", "策略的密度"),
    });
    const show = add_numbers(widget, {
      std: "σ",
      entropy: words("entropy, nats", "熵，nat"),
      clipped: words("actions clipped", "被裁剪的动作"),
      mean_sent: words("mean of the action sent", "发出的动作的均值"),
    });
    const percent = (share) => `${(100 * share).toFixed(1)}%`;

    function draw() {
      const { mean, log_std } = read();
      const std = Math.exp(log_std);
      const density = (x) => normal_density((x - mean) / std) / std;
      const sent = clipped_actions(mean, std);
      plot.clear();
      plot.area(samples(density, -3, -1), "outside");
      plot.area(samples(density, 1, 3), "outside");
      plot.line([[-1, 0], [-1, 1.2]], "edge");
      plot.line([[1, 0], [1, 1.2]], "edge");
      plot.curve(density, "blue thick");
      plot.text(-1.1, 1.1, percent(sent.below), "end");
      plot.text(1.1, 1.1, percent(sent.above), "start");
      const entropy = log_std + 0.5 * Math.log(2 * Math.PI) + 0.5;
      const mean_sent = signless(sent.mean_sent, 3);
      show({ std, entropy, clipped: percent(sent.clipped), mean_sent });
    }

    draw();
  }

  // ---- cartpole: a policy that learns while you watch ----------------------------------------

  const NUM_ITERATIONS = 50;
  const SLICE = 10; // milliseconds of work in a frame
  const CLIP_COEFS = [0.01, 0.05, 0.1, 0.2, 0.5, 1, 10];
  const LEARNING_RATES = [0.000025, 0.00025, 0.0025, 0.02, 0.1, 0.3];

  function cartpole(widget) {
    const read = add_sliders(
      widget,
      [
        { name: "clip_coef", label: "clip_coef ε", choices: CLIP_COEFS, value: 0.2 },
        { name: "learning_rate", label: "learning_rate", choices: LEARNING_RATES, value: 0.0025 },
        { name: "update_epochs", label: "update_epochs K", choices: [1, 3, 10, 30], value: 10 },
      ],
      () => Object.assign(trainer.args, read()),
    );
    const start = element("button", { type: "button", name: "start" });
    const restart = element("button", { type: "button", name: "restart" });
    restart.textContent = words("Restart", "重新开始");
    const watch = element("input", { type: "checkbox", name: "watch", checked: "" });
    const watch_label = element("label", {}, watch, words(" show every step", " 显示每一步"));
    widget.append(element("div", { class: "widget-buttons" }, start, restart, watch_label));
    const plots = element("div", { class: "widget-plots" });
    widget.append(plots);
    const scene = new Scene(plots);
    const plot = new Plot(plots, {
      x: [1, NUM_ITERATIONS], y: [0, ppo.MAX_STEPS],
      x_ticks: [1, 10, 20, 30, 40, 50], y_ticks: [0, 100, 200, 300, 400, 500],
      x_label: words("return, by iteration", "各次迭代的回报"),
      alt: words("The return over the iterations", "回报随迭代的变化"),
    });
    const show = add_numbers(widget, {
      seed: words("seed", "种子"),
      iteration: words("iteration", "迭代"),
      episodic_return: words("return", "回报"),
      approx_kl: "approx_kl",
      clipfrac: "clipfrac",
      entropy: words("entropy", "熵"),
    });
    let trainer, work, curve, seed = 0, is_running = false;
    const earlier = []; // the curves of earlier trainings

    function begin() {
      if (curve && curve.length > 1) earlier.push(curve);
      seed += 1;
      trainer = new ppo.Trainer(read(), seed);
      work = trainer.iteration();
      curve = [];
      show({ seed: String(seed), iteration: "0", episodic_return: "–" });
      show({ approx_kl: "–", clipfrac: "–", entropy: "–" });
      draw_curves();
      scene.draw(trainer.envs.obs[0]);
    }

    function run(yes) {
      is_running = yes;
      start.textContent = yes ? words("Pause", "暂停") : words("Start", "开始");
      if (yes) requestAnimationFrame(frame);
    }

    /** Work for some milliseconds, or up to the next step of the pole if every step is shown. */
    function frame() {
      if (!is_running) return;
      const end = performance.now() + SLICE;
      let unit;
      do {
        unit = work.next();
        if (unit.done) end_iteration(unit.value);
      } while (is_running && performance.now() < end && !(watch.checked && unit.value === "step"));
      scene.draw(trainer.envs.obs[0]);
      requestAnimationFrame(frame);
    }

    function end_iteration({ episodic_return, approx_kl, clipfrac, entropy }) {
      const last = curve.length ? curve[curve.length - 1][1] : 0;
      const shown = Number.isNaN(episodic_return) ? last : episodic_return; // no episode ended
      const iteration = curve.length + 1;
      curve.push([iteration, shown]);
      show({ iteration: String(iteration), episodic_return: shown.toFixed(0) });
      show({ approx_kl: approx_kl.toFixed(4), clipfrac, entropy });
      draw_curves();
      work = trainer.iteration();
      if (iteration >= NUM_ITERATIONS) {
        run(false);
        start.disabled = true;
      }
    }

    function draw_curves() {
      plot.clear();
      for (const points of earlier) plot.line(points, "grey");
      if (curve.length) plot.line(curve, "blue thick");
    }

    start.addEventListener("click", () => run(!is_running));
    restart.addEventListener("click", () => {
      begin();
      start.disabled = false;
      if (!is_running) run(true);
    });
    begin();
    run(false);
  }

  /** The cart and its pole. */
  class Scene {
    constructor(widget) {
      this.cart = svg_element("rect", { y: 78, width: 34, height: 16, rx: 2, class: "cart" });
      this.pole = svg_element("line", { class: "pole" });
      const track = svg_element("line", { x1: 12, y1: 95, x2: 348, y2: 95, class: "grid" });
      const alt = words("A cart that balances a pole", "小车与杆");
      const size = { viewBox: "0 0 360 100", class: "widget-plot" };
      const attributes = { ...size, role: "img", "aria-label": alt };
      widget.append(svg_element("svg", attributes, track, this.cart, this.pole));
    }

    draw([x, , theta]) {
      const centre = 180 + (x / ppo.MAX_POSITION) * 150;
      const length = 68;
      const [dx, dy] = [length * Math.sin(theta), length * Math.cos(theta)];
      const ends = { x1: centre, y1: 80, x2: centre + dx, y2: 80 - dy };
      for (const [name, value] of Object.entries(ends)) this.pole.setAttribute(name, value);
      this.cart.setAttribute("x", centre - 17);
    }
  }

  // ---- values: tables of a real rollout, made by docs/widgets_hook.py --------------------------

  /** Mark the same step of the same environment in all tables of the page. */
  function values(widget) {
    const same = (cell) => `.widget td[data-step="${cell.dataset.step}"]`;
    const mark = (event, is_on) => {
      const cell = event.target.closest("td[data-step]");
      if (!cell) return;
      for (const x of document.querySelectorAll(same(cell))) x.classList.toggle("same", is_on);
    };
    widget.addEventListener("mouseover", (event) => mark(event, true));
    widget.addEventListener("mouseout", (event) => mark(event, false));
  }

  // ---- All of them ---------------------------------------------------------------------------

  const WIDGETS = { clip, gae, kl, gauss, cartpole };

  function start_widgets() {
    for (const widget of document.querySelectorAll("[data-widget]")) {
      const name = widget.dataset.widget;
      if (name === "values") {
        values(widget);
        continue;
      }
      widget.replaceChildren();
      widget.setAttribute("role", "group");
      WIDGETS[name](widget);
    }
  }

  if (document.readyState === "loading") {
    document.addEventListener("DOMContentLoaded", start_widgets);
  } else {
    start_widgets();
  }
})();
