"use strict";
// The pictures, their x axis and scale, the filter, sorting, and the state that an open page keeps when it loads itself.

const dark = matchMedia("(prefers-color-scheme: dark)");
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const state = JSON.parse(sessionStorage.getItem(location.pathname) || "null") || {x: "step", y: "linear", filter: "", sorts: {}, plots: {}};
let figures = [], printing = false;

async function unpacked(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

// The layout of a figure on this screen or paper, in the colors of the page.
function layoutOf(i, plot) {
  const figure = figures[i], layout = structuredClone(figure.layout), width = plot.clientWidth, narrow = width < 560;
  const [text, line] = dark.matches && !printing ? ["#e3e6e9", "#353b43"] : ["#1f2328", "#d9dde1"];
  Object.assign(layout, {width: printing ? 690 : width, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)"});
  layout.modebar = {bgcolor: "rgba(0,0,0,0)", color: line, activecolor: text};
  layout.font = {color: text, family: "system-ui, sans-serif", size: 12};
  if (narrow && !printing) {
    layout.margin = {...layout.margin, l: 48, r: 12};
    layout.height = Math.min(layout.height, 420);
    if (layout.yaxis.type === "category") Object.assign(layout.yaxis, {showticklabels: false});
  }
  for (const axis of [layout.xaxis, layout.yaxis]) Object.assign(axis, {gridcolor: line, linecolor: line, tickcolor: line});
  const by = figure.axes[state.x];
  if (by) {
    layout.xaxis.title.text = by.title;
    layout.xaxis.range = by.range;
    if (state.y === "log") Object.assign(layout.yaxis, {type: "log", range: undefined, autorange: true});
    const zoom = (state.plots[i] || {}).zoom;
    if (zoom && zoom.x === state.x && zoom.y === state.y) {
      Object.assign(layout.xaxis, {range: zoom.ranges[0]});
      Object.assign(layout.yaxis, {range: zoom.ranges[1], autorange: false});
    }
  }
  return layout;
}

// A color, mixed with black or white: names need more contrast than lines do, and both on a dark page.
function mixed(color, other, share) {
  const parts = [1, 3, 5].map((at) => Math.round((1 - share) * parseInt(color.slice(at, at + 2), 16) + share * other));
  return `rgb(${parts.join(",")})`;
}

function colored(trace) {
  const onDark = dark.matches && !printing;
  for (const key of onDark ? ["line", "marker", "textfont", "error_x", "error_y"] : ["textfont"]) {
    if (trace[key] && trace[key].color) trace[key] = {...trace[key], color: mixed(trace[key].color, onDark ? 255 : 0, 0.3)};
  }
  return trace;
}

// The traces of a figure: those of runs whose rows are shown, and names beside the lines where there is space.
function tracesOf(i, plot) {
  const figure = figures[i], by = figure.axes[state.x], kept = state.plots[i] || {}, rows = shownRuns();
  const wide = printing || plot.clientWidth >= 560, groups = new Set();
  const passes = figure.data.map((trace) => !rows || !trace.meta || !trace.meta.name || rows.has(trace.meta.name));
  figure.data.forEach((trace, j) => { if (passes[j] && trace.meta && trace.meta.name) groups.add(trace.legendgroup); });
  return figure.data.map((trace, j) => {
    const drawn = colored({...trace, ...(by ? {x: by.x[j]} : {})});
    if (trace.type === "heatmap") drawn.visible = j === (kept.chosen || 0);
    else if (!passes[j] || (trace.mode === "text" && (!wide || (rows && by && !groups.has(trace.legendgroup))))) drawn.visible = false;
    else if ((kept.hidden || []).includes(trace.legendgroup)) drawn.visible = "legendonly";  // not drawn, but in the legend
    return drawn;
  });
}

// The names of the runs that the filter leaves; null for all.
function shownRuns() {
  if (!state.filter.trim()) return null;
  return new Set(all("table.runs tbody tr:not([hidden])").flatMap((row) => JSON.parse(row.dataset.runs)));
}

function draw(plot) {
  const i = Number(plot.dataset.figure), options = {displaylogo: false, responsive: false, modeBarButtonsToRemove: ["select2d", "lasso2d"]};
  const traces = tracesOf(i, plot);
  Plotly.react(plot, traces, layoutOf(i, plot), options);
  plot.style.minHeight = "";
  legend(plot, traces);
  if (plot.dataset.drawn) return;
  plot.dataset.drawn = "yes";
  plot.on("plotly_relayout", (change) => {
    if (!Object.keys(change).some((key) => key.includes("axis"))) return;
    const own = state.plots[i] = state.plots[i] || {}, {xaxis, yaxis} = plot.layout;
    const reset = Object.keys(change).some((key) => key.includes("autorange"));
    own.zoom = reset ? null : {x: state.x, y: state.y, ranges: [xaxis.range, yaxis.range]};
    save();
  });
}

// The names below a figure: a click hides or shows one, a double click shows it alone or all.
function legend(plot, traces) {
  const i = Number(plot.dataset.figure), box = document.querySelector(`.legend[data-of="${i}"]`), shown = new Map();
  for (const trace of traces) {
    const style = trace.mode === "lines" && !trace.opacity ? trace.line : null;  // not the raw lines
    if (trace.visible !== false && style && !shown.has(trace.legendgroup)) shown.set(trace.legendgroup, style);
  }
  const names = [...shown.keys()], hidden = () => (state.plots[i] = state.plots[i] || {}).hidden || [];
  const press = () => all("button", box).forEach((button, n) => button.setAttribute("aria-pressed", String(!hidden().includes(names[n]))));
  if (box.dataset.names === JSON.stringify(names)) return press();  // the same buttons, which may be clicked twice
  box.dataset.names = JSON.stringify(names);
  box.replaceChildren(...(names.length < 2 ? [] : names.map((name) => {
    const button = document.createElement("button"), {color, dash} = shown.get(name), dashes = dash && dash !== "solid" ? dash : "none";
    button.type = "button";
    button.innerHTML = `<svg class="sample" viewBox="0 0 32 8" aria-hidden="true"><line x1="0" y1="4" x2="32" y2="4" stroke="${color}" stroke-width="2.5" stroke-dasharray="${dashes}"/></svg>${name}`;
    button.addEventListener("click", (event) => {
      const others = names.filter((other) => other !== name), alone = others.every((other) => hidden().includes(other));
      if (event.detail > 1) state.plots[i].hidden = alone ? [] : others;
      else state.plots[i].hidden = hidden().includes(name) ? hidden().filter((other) => other !== name) : [...hidden(), name];
      draw(plot); save();
    });
    return button;
  })));
  press();
}

const redraw = () => all(".plot").filter((plot) => plot.dataset.drawn).forEach(draw);
const save = () => sessionStorage.setItem(location.pathname, JSON.stringify(state));

// A run is shown if each word of the filter is in its row, or in what is said of all runs.
function filter() {
  const words = state.filter.toLowerCase().split(/\s+/).filter(Boolean), common = all("dl").map((list) => list.textContent);
  const passes = (row) => {
    const text = [...[...row.cells].map((cell) => cell.textContent), ...common].join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  };
  const runs = new Set();
  const own = all("table.runs").pop();
  for (const row of all("tbody tr", own)) if (!(row.hidden = !passes(row))) JSON.parse(row.dataset.runs).forEach((name) => runs.add(name));
  for (const row of all("tr[data-runs]")) if (!own.contains(row)) row.hidden = !JSON.parse(row.dataset.runs).some((name) => runs.has(name));
}

function sort(table, column, direction) {
  const heads = all("th", table), body = table.tBodies[0];
  const value = (row) => { const cell = row.cells[column]; return cell.dataset.sort === undefined ? cell.textContent : Number(cell.dataset.sort); };
  const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, {numeric: true});
  heads.forEach((head, i) => head.setAttribute("aria-sort", i !== column ? "none" : direction > 0 ? "ascending" : "descending"));
  body.append(...[...body.rows].sort((a, b) => direction * compare(value(a), value(b))));
}

all("table.runs").forEach((table, t) => {
  all("th button", table).forEach((button, column) => button.addEventListener("click", () => {
    const direction = button.parentElement.ariaSort === "ascending" ? -1 : 1;
    sort(table, column, direction);
    state.sorts[t] = [column, direction];
    save();
  }));
  if (state.sorts[t] && state.sorts[t][0] < all("th", table).length) sort(table, ...state.sorts[t]);
});

const input = document.getElementById("filter");
input.value = state.filter;
input.addEventListener("input", () => { state.filter = input.value; filter(); redraw(); save(); });
filter();

for (const choice of all(".choice")) {
  const press = () => all("button", choice).forEach((button) => button.setAttribute("aria-pressed", String(button.value === state[choice.dataset.choice])));
  all("button", choice).forEach((button) => button.addEventListener("click", () => {
    state[choice.dataset.choice] = button.value;
    press(); redraw(); save();
  }));
  press();
}

for (const select of all("select[data-of]")) {
  const kept = () => state.plots[select.dataset.of] = state.plots[select.dataset.of] || {};
  if (kept().chosen < select.options.length) select.value = kept().chosen;
  select.addEventListener("change", () => { kept().chosen = Number(select.value); redraw(); save(); });
}

async function begin() {
  const script = document.createElement("script");
  script.textContent = await unpacked("plotly");
  document.head.append(script);
  figures = JSON.parse(await unpacked("figures"));
  const visible = new IntersectionObserver((entries) => entries.forEach((entry) => {
    if (entry.isIntersecting && !entry.target.dataset.drawn) draw(entry.target);
  }), {rootMargin: "1200px"});
  all(".plot").forEach((plot) => visible.observe(plot));
  dark.addEventListener("change", redraw);
  let waiting, width = innerWidth;
  addEventListener("resize", () => { clearTimeout(waiting); if (innerWidth !== width) waiting = setTimeout(() => { width = innerWidth; redraw(); }, 150); });
  addEventListener("beforeprint", () => { printing = true; all(".plot").filter((plot) => plot.clientWidth).forEach(draw); });
  addEventListener("afterprint", () => { printing = false; redraw(); });
  document.body.dataset.ready = "yes";
}

if ("DecompressionStream" in window) begin(); else document.getElementById("old").hidden = false;

// While the report is watched: load the page again, unless somebody is about to do something with it.
if (document.body.dataset.every) setInterval(() => {
  if (!document.hidden && document.activeElement !== input && !document.querySelector(":active")) { save(); location.reload(); }
}, 1000 * Number(document.body.dataset.every));
