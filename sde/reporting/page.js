"use strict";
// Draws the charts of the page again at the width they have, and answers to the reader: reading values, zooming,
// smoothing, logarithmic axes, time along the axis, the slider of previews, the search in the configuration.
// What is being looked at stands in the page's address, after the #.
(() => {
  const LEFT = 54, RIGHT = 12, TOP = 10, BOTTOM = 36, HEIGHT = 230, COLORS = 8;
  const SVG = "http://www.w3.org/2000/svg";
  const body = document.body;
  const find = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const data = JSON.parse(find("#data").textContent);
  const view = { x: "step", smooth: data.smoothing, from: null, to: null, log: {}, preview: null };

  body.dataset.errors = "0";
  const failed = () => { body.dataset.errors = String(Number(body.dataset.errors) + 1); };
  window.addEventListener("error", failed);
  document.addEventListener("securitypolicyviolation", failed);

  // Axes: the rules of axes.py

  const fixed = (value, gap) => {
    const decimals = gap > 0 ? Math.min(8, Math.max(0, -Math.floor(Math.log10(gap) + 1e-9))) : 0;
    const text = value.toFixed(decimals);
    return text.includes(".") ? text.replace(/0+$/, "").replace(/\.$/, "") : text;
  };

  function tickLabel(value, gap) {
    const size = Math.abs(value);
    if (size < 1e-3 * gap) return "0";
    for (const [unit, suffix, least] of [[1e9, "G", 1e9], [1e6, "M", 1e6], [1e3, "k", 1e4]])
      if (size >= least * (1 - 1e-9)) return fixed(value / unit, gap / unit) + suffix;
    if (size < 1e-3 * (1 - 1e-9)) {
      const exponent = Math.floor(Math.log10(size) + 1e-9);
      return `${fixed(value / 10 ** exponent, gap / 10 ** exponent)}e${exponent}`;
    }
    return fixed(value, gap);
  }

  function linearTicks(low, high, count) {
    const raw = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 5, 10].find((m) => m * power >= 0.8 * raw);
    const ticks = [];
    for (let k = Math.ceil(low / step - 1e-9); k <= Math.floor(high / step + 1e-9); k++) ticks.push(k * step);
    return ticks;
  }

  function logTicks(low, high, count) {
    const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
    let ticks = [];
    for (const multiples of [[1, 2, 5], [1, 3], [1]]) {
      ticks = [];
      for (let k = first; k <= last; k++)
        for (const m of multiples) if (low <= m * 10 ** k && m * 10 ** k <= high) ticks.push(m * 10 ** k);
      if (ticks.length <= count + 1) break;
    }
    if (ticks.length > count + 1) {
      const every = Math.ceil(ticks.length / count);
      ticks = ticks.filter((_, k) => k % every === 0);
    }
    return ticks.length >= 3 ? ticks : linearTicks(low, high, count).filter((tick) => tick > 0);
  }

  function makeAxis(values, count, log, pad) {
    let low = Infinity, high = -Infinity, ticks;
    for (const v of values) if (v !== null && (v > 0 || !log)) { low = Math.min(low, v); high = Math.max(high, v); }
    if (low > high) [low, high] = log ? [1, 10] : [0, 1];
    if (log) {
      if (high / low < 1.0001) [low, high] = [low / 1.5, high * 1.5];
      const room = (high / low) ** pad;
      [low, high] = [low / room, high * room];
      ticks = logTicks(low, high, count);
    } else {
      if (high - low <= 1e-9 * Math.max(Math.abs(high), Math.abs(low))) {
        const room = Math.abs(high) / 10 || 1;
        [low, high] = [low - room, high + room];
      }
      const room = pad * (high - low);
      [low, high] = [low - room, high + room];
      ticks = linearTicks(low, high, count);
    }
    const gaps = ticks.slice(1).map((tick, k) => Math.abs(tick - ticks[k]));
    const labels = ticks.map((tick, k) => {
      const near = gaps.slice(Math.max(0, k - 1), k + 1);
      return tickLabel(tick, near.length ? Math.min(...near) : Math.abs(tick));
    });
    const place = log
      ? (v) => Math.log(v / low) / Math.log(high / low)
      : (v) => (v - low) / (high - low);
    const value = log ? (p) => low * (high / low) ** p : (p) => low + p * (high - low);
    return { low, high, log, ticks, labels, place, value };
  }

  // As series.py smooths

  function smoothed(values, share) {
    if (share <= 0) return values;
    const n = values.length, decay = Math.exp(-1 / (share * Math.max(1, n)));
    const total = new Float64Array(n), weight = new Float64Array(n);
    for (const backwards of [false, true]) {
      let sums = 0, weights = 0;
      for (let k = 0; k < n; k++) {
        const i = backwards ? n - 1 - k : k;
        total[i] += decay * sums;
        weight[i] += decay * weights;
        sums = decay * sums + (values[i] ?? 0);
        weights = decay * weights + (values[i] !== null ? 1 : 0);
      }
    }
    return values.map((value, i) => (value === null ? null : (total[i] + value) / (weight[i] + 1)));
  }

  // Time along the axis

  const longest = Math.max(1, ...data.clocks.map((clock) => clock.seconds.at(-1) ?? 0));
  const [unit, unitSeconds] = longest > 7200 ? ["hours", 3600] : longest > 180 ? ["minutes", 60] : ["seconds", 1];

  function timeOf(step, clock) {
    const { step: steps, seconds } = clock;
    if (!steps.length) return null;
    const k = Math.min(Math.max(1, upper(steps, step)), steps.length - 1);
    if (steps.length === 1 || step <= steps[0]) return seconds[0] * (steps[0] ? step / steps[0] : 1) / unitSeconds;
    const share = Math.min(1, (step - steps[k - 1]) / (steps[k] - steps[k - 1]));
    return (seconds[k - 1] + share * (seconds[k] - seconds[k - 1])) / unitSeconds;
  }

  function upper(sorted, value) { // the first index whose entry is above value
    let low = 0, high = sorted.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sorted[middle] <= value) low = middle + 1; else high = middle;
    }
    return low;
  }

  function nearest(sorted, value) {
    const k = upper(sorted, value);
    if (k === 0) return 0;
    return k < sorted.length && sorted[k] - value < value - sorted[k - 1] ? k : k - 1;
  }

  // Charts

  function draw(tag, attributes, text) {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    return node;
  }

  class Chart {
    constructor(spec, number) {
      Object.assign(this, spec);
      this.number = number;
      this.figure = find(`figure[data-key="${CSS.escape(spec.key)}"]`);
      this.plot = find(".plot", this.figure);
      this.button = find("button", this.figure);
      this.values = all(".legend .value", this.figure);
      this.at = find(".at", this.figure);
      this.over = spec.x === "step";
      this.button.addEventListener("click", () => { view.log[this.key] = !this.isLog(); changed(); });
      this.plot.addEventListener("pointermove", (event) => this.pointed(event));
      this.plot.addEventListener("pointerleave", () => { this.dragged = null; readAt(null, this); });
      this.plot.addEventListener("pointerdown", (event) => { this.dragged = this.over ? this.valueAt(event) : null; });
      this.plot.addEventListener("pointerup", (event) => this.released(event));
      this.plot.addEventListener("dblclick", () => zoom(null, null));
      this.plot.addEventListener("keydown", (event) => this.pressed(event));
    }

    isLog() { return view.log[this.key] ?? this.log; }

    render() {
      const timed = this.over && view.x === "time";
      this.curves = this.series.map((series) => {
        const x = timed ? series.x.map((step) => timeOf(step, data.clocks[series.run])) : series.x;
        const line = series.smooth && view.smooth > 0 ? smoothed(series.mean ?? series.y, view.smooth) : null;
        return { ...series, x, line };
      }).filter((curve) => curve.x[0] !== null);
      const width = Math.max(200, this.plot.clientWidth), log = this.isLog();
      const [from, to] = this.over ? [view.from ?? -Infinity, view.to ?? Infinity] : [-Infinity, Infinity];
      const xs = [], ys = this.zero && !log ? [0] : [];
      for (const { x, y, line } of this.curves)
        x.forEach((value, i) => { if (value >= from && value <= to) { xs.push(value); ys.push(y[i], line?.[i] ?? null); } });
      if (Number.isFinite(from)) xs.push(from);
      if (Number.isFinite(to)) xs.push(to);
      const flat = this.zero && !log && !ys.some(Boolean);
      this.xAxis = makeAxis(xs, Math.max(2, Math.min(6, Math.floor(width / 60))), false, 0.01);
      this.yAxis = makeAxis(ys, 5, log, flat ? 0 : 0.05);
      this.width = width;
      this.inner = width - LEFT - RIGHT;
      this.svg = draw("svg", {
        viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img", "aria-label": this.label,
      });
      const clip = draw("clipPath", { id: `clip${this.number}` });
      clip.append(draw("rect", { x: LEFT, y: TOP - 3, width: this.inner, height: HEIGHT - TOP - BOTTOM + 6 }));
      this.svg.append(clip, this.drawFrame(timed ? unit : this.x), this.drawCurves());
      this.cursor = draw("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
      this.chosen = draw("rect", { class: "chosen", y: TOP, height: HEIGHT - TOP - BOTTOM, visibility: "hidden" });
      this.svg.append(this.cursor, this.chosen);
      this.plot.replaceChildren(this.svg);
      this.button.setAttribute("aria-pressed", String(log));
      this.read(null);
    }

    px(value) { return LEFT + this.xAxis.place(value) * this.inner; }
    py(value) { return HEIGHT - BOTTOM - this.yAxis.place(value) * (HEIGHT - TOP - BOTTOM); }

    drawFrame(name) {
      const frame = draw("g", { class: "frame" });
      this.yAxis.ticks.forEach((tick, k) => {
        const y = this.py(tick).toFixed(1);
        frame.append(draw("line", { class: "grid", x1: LEFT, x2: this.width - RIGHT, y1: y, y2: y }));
        frame.append(draw("text", { class: "y", x: LEFT - 6, y, dy: "0.32em" }, this.yAxis.labels[k]));
      });
      this.xAxis.ticks.forEach((tick, k) => {
        const x = this.px(tick).toFixed(1);
        frame.append(draw("line", { class: "grid", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }));
        frame.append(draw("text", { class: "x", x, y: HEIGHT - BOTTOM + 15 }, this.xAxis.labels[k]));
      });
      frame.append(draw("text", { class: "name", x: this.width - RIGHT, y: HEIGHT - 4 }, name));
      return frame;
    }

    drawCurves() {
      const group = draw("g", { "clip-path": `url(#clip${this.number})` });
      for (const curve of this.curves) {
        const color = `c${curve.color % COLORS}${curve.dashed ? " dashed" : ""}`;
        const behind = curve.line || curve.faint ? " behind" : "";
        group.append(draw("path", { class: `curve ${color}${behind}`, d: this.path(curve.x, curve.y) }));
        if (curve.line) group.append(draw("path", { class: `curve ${color} smooth`, d: this.path(curve.x, curve.line) }));
        const marked = (curve.dashed || curve.x.length === 1) && curve.x.length <= 60;
        curve.y.forEach((y, i) => {
          const x = this.px(curve.x[i]).toFixed(1);
          if (y === null) group.append(draw("path", { class: "bad", d: `M${x} ${HEIGHT - BOTTOM - 8}l4 8h-8z` }));
          else if (marked && (y > 0 || !this.yAxis.log))
            group.append(draw("circle", { class: `mark ${color}${behind}`, cx: x, cy: this.py(y).toFixed(1), r: 2.4 }));
        });
      }
      return group;
    }

    path(x, y) {
      let words = "", pen = "M";
      for (let i = 0; i < x.length; i++) {
        if (y[i] === null || (this.yAxis.log && y[i] <= 0)) { pen = "M"; continue; }
        words += `${pen}${this.px(x[i]).toFixed(1)} ${this.py(y[i]).toFixed(1)}`;
        pen = "L";
      }
      return words;
    }

    // Reading

    valueAt(event) {
      const place = (event.clientX - this.svg.getBoundingClientRect().left - LEFT) / this.inner;
      return this.xAxis.value(Math.min(1, Math.max(0, place)));
    }

    pointed(event) {
      const value = this.valueAt(event);
      readAt(value, this);
      if (this.dragged != null && event.buttons) {
        const [a, b] = [this.px(this.dragged), this.px(value)].sort((p, q) => p - q);
        this.chosen.setAttribute("x", a);
        this.chosen.setAttribute("width", b - a);
        this.chosen.setAttribute("visibility", "visible");
      }
    }

    released(event) {
      if (this.dragged == null) return;
      const [low, high] = [this.dragged, this.valueAt(event)].sort((p, q) => p - q);
      this.dragged = null;
      this.chosen.setAttribute("visibility", "hidden");
      if (this.px(high) - this.px(low) > 8) zoom(low, high);
    }

    pressed(event) {
      const x = this.curves.map((curve) => curve.x).sort((p, q) => q.length - p.length)[0] ?? [];
      const now = this.cursorAt === null ? x.length - 1 : nearest(x, this.cursorAt);
      const next = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: x.length - 1 }[event.key];
      if (event.key === "Escape") readAt(null, this);
      if (next === undefined || !x.length) return;
      event.preventDefault();
      readAt(x[Math.min(x.length - 1, Math.max(0, next))], this, true);
    }

    read(value, aloud = false) {
      this.cursorAt = value;
      let seen = null;
      this.curves.forEach((curve, k) => {
        const at = value === null ? curve.x.length - 1 : nearest(curve.x, value);
        const show = (number) => (number === null || number === undefined ? "not finite" : String(+number.toPrecision(4)));
        const smooth = curve.line ? ` (${show(curve.line[at])})` : "";
        this.values[k].textContent = show(curve.y[at]) + smooth;
        if (seen === null || Math.abs(curve.x[at] - value) < Math.abs(seen - value)) seen = curve.x[at];
      });
      this.cursor.setAttribute("visibility", value === null ? "hidden" : "visible");
      this.at.setAttribute("aria-live", aloud ? "polite" : "off");
      if (value === null || seen === null) { this.at.textContent = ""; return; }
      const x = this.px(seen).toFixed(1);
      this.cursor.setAttribute("x1", x);
      this.cursor.setAttribute("x2", x);
      const name = this.over && view.x === "time" ? unit : this.x;
      const spoken = aloud ? `: ${this.curves.map((c, k) => `${c.label} ${this.values[k].textContent}`).join(", ")}` : "";
      this.at.textContent = `${name} ${+seen.toPrecision(6)}${spoken}`;
    }
  }

  const charts = data.charts.map((spec, number) => new Chart(spec, number));

  function readAt(value, source, aloud = false) {
    for (const chart of charts)
      if (chart === source || (chart.over && source.over)) chart.read(value, aloud && chart === source);
  }

  function zoom(from, to) {
    view.from = from === null ? null : +from.toPrecision(4);
    view.to = to === null ? null : +to.toPrecision(4);
    changed();
  }

  // Maps: reading alone; they are pictures

  for (const map of data.maps) {
    const figure = find(`figure[data-key="${CSS.escape(map.key)}"]`);
    const image = find("image", figure), at = find(".at", figure);
    let row = 0, column = map.steps.length - 1;
    const say = () => {
      const value = map.rows[column][row];
      at.textContent = `step ${map.steps[column]}, log SNR ${map.centers[row]}: ${value === null ? "no number" : value}`;
    };
    find(".plot", figure).addEventListener("pointermove", (event) => {
      const box = image.getBoundingClientRect();
      const place = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
      if (Math.min(...place) < 0 || Math.max(...place) >= 1) return;
      column = Math.floor(place[0] * map.steps.length);
      row = map.centers.length - 1 - Math.floor(place[1] * map.centers.length);
      say();
    });
    find(".plot", figure).addEventListener("keydown", (event) => {
      const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
      if (!move) return;
      event.preventDefault();
      column = Math.min(map.steps.length - 1, Math.max(0, column + move[0]));
      row = Math.min(map.centers.length - 1, Math.max(0, row + move[1]));
      say();
    });
  }

  // Previews: each run shows its newest one at or before the chosen step

  const slider = find("#preview");
  const steps = slider ? slider.dataset.steps.split(" ").map(Number) : [];

  function showPreviews() {
    if (!slider) return;
    const step = view.preview ?? steps.at(-1);
    const k = Math.max(0, upper(steps, step) - 1);
    slider.value = k;
    slider.setAttribute("aria-valuetext", `step ${steps[k]}`);
    find("#preview-step").textContent = steps[k];
    for (const strip of all(".strip")) {
      const figures = all("figure", strip).sort((a, b) => a.dataset.step - b.dataset.step);
      const before = figures.filter((figure) => Number(figure.dataset.step) <= steps[k]);
      const chosen = before.at(-1) ?? figures[0];
      for (const figure of figures) figure.classList.toggle("shown", figure === chosen);
    }
  }

  // Controls and the address

  const controls = { x: find("#x"), smooth: find("#smooth"), from: find("#from"), to: find("#to") };
  const number = (text) => (text === null || text === "" || !Number.isFinite(Number(text)) ? null : Number(text));

  function readAddress() {
    const words = new URLSearchParams(location.hash.slice(1));
    Object.assign(view, { x: words.get("x") === "time" ? "time" : "step", log: {} });
    view.smooth = Math.min(0.2, Math.max(0, number(words.get("smooth")) ?? data.smoothing));
    for (const name of ["from", "to"]) view[name] = number(words.get(name));
    view.preview = number(words.get("step"));
    for (const [word, value] of [["log", true], ["linear", false]])
      for (const key of (words.get(word) ?? "").split(",")) if (key) view.log[key] = value;
  }

  function writeAddress() {
    const words = new URLSearchParams();
    if (view.x !== "step") words.set("x", view.x);
    if (view.smooth !== data.smoothing) words.set("smooth", view.smooth);
    for (const name of ["from", "to"]) if (view[name] !== null) words.set(name, view[name]);
    if (view.preview !== null) words.set("step", view.preview);
    for (const [word, value] of [["log", true], ["linear", false]]) {
      const keys = Object.keys(view.log).filter((key) => view.log[key] === value);
      if (keys.length) words.set(word, keys.join(","));
    }
    history.replaceState(null, "", `#${words}`);
  }

  function show() {
    controls.x.value = view.x;
    controls.smooth.value = view.smooth;
    find("#smooth-share").textContent = `${+(100 * view.smooth).toPrecision(3)} %`;
    controls.from.value = view.from ?? "";
    controls.to.value = view.to ?? "";
    for (const chart of charts) chart.render();
    showPreviews();
  }

  function changed() { writeAddress(); show(); }

  controls.x.addEventListener("change", () => { Object.assign(view, { x: controls.x.value, from: null, to: null }); changed(); });
  controls.smooth.addEventListener("input", () => { view.smooth = Number(controls.smooth.value); changed(); });
  for (const name of ["from", "to"])
    controls[name].addEventListener("change", () => { view[name] = number(controls[name].value); changed(); });
  find("#reset").addEventListener("click", () => {
    Object.assign(view, { x: "step", smooth: data.smoothing, from: null, to: null, log: {} });
    changed();
  });
  slider?.addEventListener("input", () => {
    view.preview = steps[Number(slider.value)];
    writeAddress();
    showPreviews();
  });
  for (const search of all("input[type=search]"))
    search.addEventListener("input", () => {
      const words = search.value.toLowerCase().split(/\s+/);
      for (const row of all("tbody tr", search.closest("details")))
        row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    });
  window.addEventListener("hashchange", () => { readAddress(); show(); });

  let width = 0;
  new ResizeObserver(() => {
    if (body.clientWidth !== width) { width = body.clientWidth; for (const chart of charts) chart.render(); }
  }).observe(body);

  find('option[value="time"]').textContent = unit;
  document.documentElement.classList.add("scripted");
  readAddress();
  show();
  body.dataset.ready = "true";
})();
