// Draws the report from its data block. Texts of runs are only ever put in as text: by textContent in HTML, by `clean`
// in Plotly, which reads a little HTML of its own.
"use strict";
(() => {
let data = JSON.parse(document.getElementById("data").textContent), runs = data.runs;
const alone = data.kind === "run";
const byId = id => document.getElementById(id);
const colourOf = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const clean = text => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const known = v => v !== null && v !== undefined && v !== "";

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name === "class_" ? "class" : name, value === true ? "" : value);
  }
  node.append(...children.filter(known));
  return node;
}

// ------------------------------------------------------------------------------------- numbers as text
function short(v) {
  if (!known(v)) return "";
  if (typeof v !== "number") return String(v);
  if (Number.isInteger(v) && Math.abs(v) < 1e7) return v.toLocaleString("en-US");
  const size = Math.abs(v);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return v.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  return size >= 1000 ? Math.round(v).toLocaleString("en-US") : String(Number(v.toPrecision(4)));
}
// A setting is shown as it was written.
const setting = v => typeof v === "number" && v !== 0 && Math.abs(v) < 1e-3 ? v.toExponential().replace("e+", "e") : known(v) ? String(v) : "";
const percent = v => known(v) ? `${Math.round(v * 100)} %` : "";
const gigabytes = v => known(v) ? `${Number((v / 1e9).toPrecision(3))} GB` : "";
function duration(s) {
  if (!known(s)) return "";
  if (s < 90) return `${Number(s.toPrecision(3))} s`;
  return s < 5400 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`;
}

// ------------------------------------------------------------------------------------- what is shown
const state = { x: "samples", smoothing: alone ? 1 : 2, colour: "", bands: false, log: {}, filter: "", chosen: new Set(), hidden: new Set(), sorted: {} };
let visible = runs.map((_, i) => i);
const WIDTHS = [0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2]; // of a curve, which a smoothed point is the mean of

// ------------------------------------------------------------------------------------- curves
/** At steps, what is known at the steps `from`: linear between them, and on beyond them. */
function between(steps, from, to) {
  const n = from.length;
  let j = 0;
  return steps.map(s => {
    if (n < 2) return to[0];
    while (j < n - 2 && from[j + 1] < s) j++;
    while (j > 0 && from[j] > s) j--;
    return to[j] + (s - from[j]) / (from[j + 1] - from[j]) * (to[j + 1] - to[j]);
  });
}
function placed(run, steps) {
  if (state.x === "step") return steps;
  const at = between(steps, run.grid[0], run.grid[["step", "samples", "time", "flops"].indexOf(state.x)]);
  return state.x === "samples" ? at.map(v => Math.round(v)) : at;
}
/** Running means over an odd number of points, of those that are known. */
function smooth(values, share) {
  const half = Math.round(values.length * share / 2);
  if (!half) return values;
  const sums = [0], counts = [0];
  values.forEach((v, i) => { sums.push(sums[i] + (v ?? 0)); counts.push(counts[i] + (v === null ? 0 : 1)); });
  return values.map((v, i) => {
    const a = Math.max(0, i - half), b = Math.min(values.length, i + half + 1), n = counts[b] - counts[a];
    return n ? Number(((sums[b] - sums[a]) / n).toPrecision(6)) : null;
  });
}
function curve(run, name, share = WIDTHS[state.smoothing]) {
  const evaluation = run.evaluations[name];
  if (evaluation && !(name in data.signals)) {
    const [steps, samples, y] = evaluation;
    return { x: state.x === "samples" ? samples : placed(run, steps), y };
  }
  if (!(name in run.means)) return null;
  if (!share && run.stepwise[name]) return { x: placed(run, run.stepwise[name][0]), y: run.stepwise[name][1] };
  let y = smooth(run.means[name], share);
  if (name === "grad_norm_corrected") y = y.map(v => v === null ? null : Math.sqrt(Math.max(0, v))); // means of squares
  return { x: placed(run, run.grid[0]), y };
}
/** The curves of runs that differ in their seeds alone, as one: mean, lowest, highest where all of them are. */
function together(curves) {
  const solid = curves.map(c => {
    const at = c.y.map((v, i) => i).filter(i => c.y[i] !== null);
    return { x: at.map(i => c.x[i]), y: at.map(i => c.y[i]) };
  }).filter(c => c.x.length);
  if (!solid.length) return null;
  const from = Math.max(...solid.map(c => c.x[0])), to = Math.min(...solid.map(c => c.x[c.x.length - 1]));
  const longest = solid.reduce((a, b) => b.x.length > a.x.length ? b : a);
  const x = longest.x.filter(v => v >= from && v <= to);
  const all = solid.map(c => between(x, c.x, c.y));
  const of = f => x.map((_, i) => f(all.map(y => y[i])));
  return { x, mean: of(v => v.reduce((a, b) => a + b) / v.length), low: of(v => Math.min(...v)), high: of(v => Math.max(...v)) };
}

// ------------------------------------------------------------------------------------- colours
const dark = matchMedia("(prefers-color-scheme: dark)");
const CATEGORIES = { light: ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56B4E9", "#5D4E8C", "#6B7280"], dark: ["#56B4E9", "#F08A4B", "#2BC79A", "#E29CC4", "#E6C229", "#9BB8FF", "#B79CED", "#A3AEBB"] };
const RAMPS = { light: ["#440154", "#3b528b", "#21918c", "#5ec962"], dark: ["#5b5bd6", "#2a9d9d", "#5ec962", "#fde725"] };
const theme = () => dark.matches ? "dark" : "light";
function ramp(t) {
  const stops = RAMPS[theme()], at = Math.min(stops.length - 1.001, Math.max(0, t) * (stops.length - 1)), i = Math.floor(at);
  const part = k => [0, 1, 2].map(c => parseInt(k.slice(1 + 2 * c, 3 + 2 * c), 16));
  const a = part(stops[i]), b = part(stops[i + 1]);
  return `rgb(${a.map((v, c) => Math.round(v + (b[c] - v) * (at - i))).join(",")})`;
}
const order = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
const distinct = values => [...new Map(values.map(v => [JSON.stringify(v ?? null), v])).values()].sort(order);
const given = (run, name) => name === "seed" ? run.seed : name === "status" ? run.status : name === "" ? run.name : run.fields[name];
let palette = new Map();
function paint() {
  const values = distinct(runs.map(r => given(r, state.colour)));
  const ordered = values.length > CATEGORIES.light.length || (values.length > 2 && values.every(v => typeof v === "number"));
  palette = new Map(values.map((v, i) => [JSON.stringify(v ?? null), ordered ? ramp(i / Math.max(1, values.length - 1)) : CATEGORIES[theme()][i % 8]]));
  const key = values.length > 24 ? [values[0], "…", values[values.length - 1]] : values;
  byId("key").replaceChildren(el("span", { class_: "quiet" }, data.fields[state.colour] ?? (state.colour || "run")), ...key.map(v => el("span", { class_: "chip" }, v === "…" ? "…" : dot(palette.get(JSON.stringify(v ?? null))), v === "…" ? "" : setting(v) || "none")), ...dash().labels.map(text => el("span", { class_: "chip" }, text)));
}
const DASHES = ["solid", "dash", "dot", "dashdot"];
/** Where colours tell one field, dashes tell the other of two, if it has few values. */
function dash(run) {
  const [other, more] = Object.keys(data.fields).filter(n => n !== state.colour), values = other && !more ? distinct(runs.map(r => r.fields[other])) : [];
  if (!(state.colour in data.fields) || values.length < 2 || values.length > DASHES.length) return { dash: "solid", labels: [] };
  return { dash: run && DASHES[values.findIndex(v => v === run.fields[other])], labels: values.map((v, i) => `${["—", "– –", "· ·", "– ·"][i]} ${data.fields[other]} ${setting(v)}`) };
}
const colour = run => palette.get(JSON.stringify(given(run, state.colour) ?? null));
function dot(fill) { const node = el("span", { class_: "dot" }); node.style.background = fill; return node; }

// ------------------------------------------------------------------------------------- plots
const figures = [];
/** A plot with its heading, unless the page has it; `draw` gives traces and what its layout has of its own, or nothing to show. */
function figure(parent, name, title, note, draw, logs = null) {
  if (figures.some(f => f.id === `${parent} ${name}`)) return;
  const button = logs === null ? "" : el("button", { type: "button", "aria-pressed": String(logs), title: "logarithmic scale", onclick: () => { state.log[name] = !state.log[name]; button.setAttribute("aria-pressed", String(state.log[name])); show(entry); } }, "log");
  state.log[name] = logs === true;
  const caption = el("span", {}, note), plot = el("div", { class_: "plot", role: "img", "aria-label": title });
  const node = el("figure", {}, el("figcaption", {}, el("b", {}, title), caption, button), plot);
  const entry = { id: `${parent} ${name}`, name, node, plot, draw, caption, note };
  byId(parent).append(node);
  figures.push(entry);
}
const BAR = 30; // pixels above a plot that the tool bar has for itself
const LEGEND = 24; // pixels of a line of the legend
function layoutOf(own) {
  const soft = colourOf("--soft"), line = colourOf("--line"), axis = { gridcolor: line, linecolor: line, zerolinecolor: line, tickfont: { color: soft }, automargin: true };
  const { xaxis = {}, yaxis = {}, ...rest } = own;
  return { font: { family: "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", size: 12, color: colourOf("--ink") }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 48, r: 12, t: BAR, b: 36 }, modebar: { bgcolor: "rgba(0,0,0,0)", color: colourOf("--faint"), activecolor: colourOf("--accent") }, showlegend: false, hovermode: "closest", uirevision: "kept", dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    hoverlabel: { bgcolor: colourOf("--card"), bordercolor: line, font: { color: colourOf("--ink") }, namelength: -1 },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { color: soft } }, ...rest,
    xaxis: { ...axis, showgrid: false, ticks: "outside", tickcolor: line, ...xaxis }, yaxis: { ...axis, ...yaxis } };
}
function show(entry) {
  const drawn = entry.draw(entry);
  const empty = !drawn || !drawn.traces.length;
  entry.node.hidden = empty;
  if (empty) { if (entry.plot.data) Plotly.purge(entry.plot); return; }
  if (drawn.height) entry.plot.style.height = drawn.height;
  Plotly.react(entry.plot, drawn.traces, layoutOf(drawn.layout), { responsive: true, displaylogo: false, displayModeBar: "hover", modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] });
}
let turn = 0;
/** One plot at a time, so that the page answers between them. */
function showAll(which = figures) {
  const mine = ++turn, left = [...which];
  const next = () => {
    if (mine !== turn) return;
    const entry = left.shift();
    if (!entry) { document.documentElement.dataset.drawn = String(mine); return; }
    show(entry);
    setTimeout(next);
  };
  next();
}
const xTitle = () => ({ samples: "samples", step: "steps", time: "training time, s", flops: "model FLOPs" })[state.x];
/** The part of an axis that most of the curves need: a run that blew up is not let to flatten the others. */
function bounds(traces, logarithmic) {
  const values = traces.filter(t => !t.skip).flatMap(t => t.y).filter(v => v !== null && (!logarithmic || v > 0)).map(v => logarithmic ? Math.log10(v) : v).sort((a, b) => a - b);
  if (values.length < 20) return null;
  const at = q => values[Math.floor(q * (values.length - 1))], low = at(0.02), high = at(0.95), span = high - low;
  const top = values[values.length - 1], bottom = values[0];
  if (top === bottom && !logarithmic) return bottom > 0 ? [0, 1.25 * bottom] : null;
  if (!span || (top <= high + 3 * span && bottom >= low - 3 * span)) return null;
  return [Math.max(bottom, low - span) - 0.08 * span, Math.min(top, high + span) + 0.08 * span];
}
// Labels within decades overlap in plotly where an axis spans one to three of them, so that it shows 1, 2 and 5 there.
const logTicks = ([low, high]) => high - low > 3 ? { nticks: 7 } : high - low > 0.7 ? { dtick: "D2" } : { nticks: 5 };
function extent(traces) {
  const logs = traces.flatMap(t => t.y).filter(v => v > 0).map(Math.log10);
  return [logs.reduce((a, b) => Math.min(a, b), Infinity), logs.reduce((a, b) => Math.max(a, b), -Infinity)];
}
function drawCurves(entry) {
  const logarithmic = state.log[entry.name], traces = [];
  const faded = i => state.chosen.size > 0 && !state.chosen.has(i);
  const positive = c => c && (logarithmic ? { x: c.x, y: c.y.map(v => v > 0 ? v : null) } : c);
  const shown = visible.map(i => ({ i, run: runs[i], c: positive(curve(runs[i], entry.name)) })).filter(e => e.c && e.c.y.some(v => v !== null));
  const sparse = entry.name in (shown[0]?.run.evaluations ?? {}) && !(entry.name in data.signals);
  if (!alone && state.bands && !state.chosen.size) {
    const groups = new Map();
    shown.forEach(e => groups.set(e.run.group, [...(groups.get(e.run.group) ?? []), e]));
    for (const members of groups.values()) {
      const t = together(members.map(e => e.c)), fill = colour(members[0].run);
      if (!t) continue;
      const label = `${runLabel(members[0].run)} (${members.length} ${members.length > 1 ? "seeds" : "seed"})`, plain = { hoverinfo: "skip", mode: "lines", line: { width: 0 }, skip: true };
      if (members.length > 1) traces.push({ ...plain, x: t.x, y: t.low }, { ...plain, x: t.x, y: t.high, fill: "tonexty", fillcolor: faint(fill) });
      traces.push(line(t.x, t.mean, label, fill, 1.8, sparse, dash(members[0].run).dash));
    }
  } else {
    for (const { i, run, c } of shown) {
      if (alone && state.smoothing && run.stepwise[entry.name]) traces.push({ ...line(...Object.values(curve(run, entry.name, 0)), "each step", faint(mainColour(), 0.35), 1), hoverinfo: "skip" });
      traces.push({ ...line(c.x, c.y, alone ? data.signals[entry.name]?.title ?? entry.name : runLabel(run, true), alone ? mainColour() : colour(run), alone ? 1.8 : state.chosen.has(i) ? 2.6 : runs.length > 40 ? 1.1 : 1.5, sparse, alone ? "solid" : dash(run).dash), opacity: faded(i) ? 0.12 : 1 });
    }
  }
  if (alone && entry.name === "loss" && traces.length) held(traces);
  const range = bounds(traces, logarithmic);
  const cut = range && traces.some(t => !t.skip && t.y.some(v => v !== null && (logarithmic ? v > 0 && Math.log10(v) > range[1] : v > range[1])));
  entry.caption.textContent = entry.note + (cut ? `${entry.note ? " · " : ""}axis cut, a double click shows all` : "");
  const layout = { xaxis: { title: { text: xTitle(), font: { size: 11, color: colourOf("--faint") } }, rangemode: "tozero" }, yaxis: logarithmic ? { type: "log", tickformat: "~g", ...logTicks(range ?? extent(traces)) } : { type: "linear" }, uirevision: `${state.x} ${logarithmic}` };
  if (range) layout.yaxis.range = range;
  const named = traces.filter(t => t.hoverinfo !== "skip").length, lines = named > 1 ? Math.ceil(named / (innerWidth < 600 ? 2 : 3)) : 0;
  if (alone) Object.assign(layout, { showlegend: lines > 0, hovermode: "x unified", ...landmarks() }, lines ? { margin: { l: 48, r: 12, t: BAR + LEGEND * lines, b: 36 } } : {});
  return { traces, layout };
}
const mainColour = () => CATEGORIES[theme()][0];
function line(x, y, name, fill, width, markers = false, dash = "solid") {
  return { type: "scatter", x, y, name: clean(name), mode: markers ? "lines+markers" : y.filter(v => v !== null).length > 1 ? "lines" : "markers", line: { color: fill, width, dash }, marker: { color: fill, size: 5 }, connectgaps: true, hovertemplate: `%{y:.5~g}<extra>${clean(name)}</extra>` };
}
function faint(fill, alpha = 0.16) {
  const parts = fill.startsWith("#") ? [1, 3, 5].map(i => parseInt(fill.slice(i, i + 2), 16)) : fill.match(/\d+/g).slice(0, 3);
  return `rgba(${parts.join(",")},${alpha})`;
}
/** A run in words: what it was given. */
function runLabel(run, withSeed = false) {
  const parts = Object.entries(data.fields).map(([name, label]) => `${label} ${setting(run.fields[name])}`);
  if (withSeed && seeded()) parts.push(`seed ${run.seed}`);
  return (withSeed || !parts.length ? [run.name, ...parts] : parts).join(" · ");
}
const seeded = () => distinct(runs.map(r => r.seed)).length > 1;
/** Held-out losses beside the training loss. */
function held(traces) {
  const all = runs[0].evaluations, whole = JSON.stringify(all["eval/loss"]); // of a single source the same again
  Object.keys(all).filter(n => n.startsWith("eval/") && data.lower.includes(n) && (n === "eval/loss" || JSON.stringify(all[n]) !== whole)).slice(0, 6).forEach((name, i) => {
    const c = curve(runs[0], name);
    traces.push(line(c.x, c.y, name === "eval/loss" ? "held out" : name, CATEGORIES[theme()][1 + i % 7], 1.6, true));
  });
}
/** Phases as shades, checkpoints, resumes and ends as lines. */
function landmarks() {
  const run = runs[0], shapes = [], annotations = [];
  if (!run.grid[0].length) return {};
  const at = step => placed(run, [step])[0];
  run.phases.forEach(([name, first, last], i) => {
    if (run.phases.length < 2) return;
    if (i % 2) shapes.push({ type: "rect", xref: "x", yref: "paper", x0: at(first - 0.5), x1: at(last + 0.5), y0: 0, y1: 1, fillcolor: colourOf("--band"), line: { width: 0 }, layer: "below" });
    annotations.push({ xref: "x", yref: "paper", x: at(first), y: 1, xanchor: "left", yanchor: "top", text: clean(name), showarrow: false, font: { size: 10, color: colourOf("--soft") } });
  });
  const mark = (step, fill, dash) => shapes.push({ type: "line", xref: "x", yref: "paper", x0: at(step), x1: at(step), y0: 0, y1: dash === "tick" ? 0.03 : 1, line: { color: fill, width: 1.2, dash: dash === "tick" ? "solid" : dash } });
  run.checkpoints.forEach(step => mark(step, colourOf("--soft"), "tick"));
  run.events.filter(e => e.event === "resumed").forEach(e => mark(e.step, colourOf("--warn"), "dot"));
  if (["stopped", "failed"].includes(run.status)) mark(run.step, colourOf("--bad"), "dash");
  return { shapes, annotations };
}

// ------------------------------------------------------------------------------------- over axes
const axisOf = run => known(run.metric) ? run.metric : null;
function drawGrid() {
  const a = byId("grid-x").value, b = byId("grid-y").value, members = visible.map(i => runs[i]), xs = distinct(members.map(r => given(r, a)));
  const better = data.mode === "min" ? Math.min : Math.max;
  if (a === b || !b) { // one axis: the metric itself
    const done = members.filter(r => axisOf(r) !== null);
    const means = xs.map(v => done.filter(r => r.fields[a] === v).map(r => r.metric)).map(v => v.length ? v.reduce((p, q) => p + q) / v.length : null);
    const labels = xs.map(setting), at = r => setting(r.fields[a]);
    if (!done.length) return null;
    return { traces: [{ ...line(labels, means, "mean", mainColour(), 2, true), marker: { size: 8, color: mainColour() } }, { type: "scatter", mode: "markers", x: done.map(at), y: done.map(r => r.metric), marker: { color: faint(mainColour(), 0.55), size: 7 }, hovertemplate: "%{y:.5~g}<extra>%{text}</extra>", text: done.map(r => clean(runLabel(r, true))) }],
      layout: { xaxis: { type: "category", title: { text: clean(data.fields[a]) } }, yaxis: { title: { text: clean(data.metric) } } } };
  }
  const ys = distinct(members.map(r => given(r, b)));
  const cells = ys.map(y => xs.map(x => members.filter(r => given(r, a) === x && given(r, b) === y)));
  const z = cells.map(row => row.map(c => { const v = c.map(axisOf).filter(known); return v.length ? v.reduce((p, q) => p + q) / v.length : null; }));
  const all = z.flat().filter(known);
  if (!all.length) return null;
  const best = better(...all);
  const text = cells.map((row, j) => row.map((c, i) => z[j][i] === null ? [...new Set(c.map(r => r.status))].join(", ") : `${short(z[j][i])}${z[j][i] === best ? " ★" : ""}`));
  const sorted = [...all].sort((p, q) => p - q), span = sorted[Math.floor(0.75 * (all.length - 1))] - sorted[0];
  const cut = data.mode === "min" && span > 0 ? Math.min(sorted[sorted.length - 1], sorted[0] + 4 * span) : sorted[sorted.length - 1];
  const scale = RAMPS[theme()].map((c, i, s) => [data.mode === "min" ? 1 - i / (s.length - 1) : i / (s.length - 1), c]).sort((p, q) => p[0] - q[0]);
  const low = sorted[0], high = cut > low ? cut : low + 1;
  const shades = z.map(row => row.map(v => v === null ? null : (Math.min(v, high) - low) / (high - low)));
  const goodness = v => { const t = (Math.min(v, high) - low) / (high - low); return data.mode === "min" ? 1 - t : t; };
  const annotations = z.flatMap((row, j) => row.map((v, i) => ({ x: i, y: j, text: clean(text[j][i]), showarrow: false, font: { size: 13, color: v === null ? colourOf("--faint") : goodness(v) > 0.55 ? "#0c1117" : "#ffffff" } })));
  const axis = (values, name) => ({ tickvals: values.map((_, i) => i), ticktext: values.map(v => clean(setting(v) || "none")), range: [-0.5, values.length - 0.5], title: { text: clean(data.fields[name] ?? name) }, showgrid: false, zeroline: false, ticks: "" });
  const hover = cells.map((row, j) => row.map((c, i) => `${clean(data.fields[a] ?? a)} ${clean(setting(xs[i]))}<br>${clean(data.fields[b] ?? b)} ${clean(setting(ys[j]))}<br>${clean(data.metric)} ${short(z[j][i])}, ${c.filter(r => axisOf(r) !== null).length} of ${c.length} at their end`));
  return { traces: [{ type: "heatmap", z, zmin: low, zmax: high, colorscale: scale, xgap: 4, ygap: 4, hoverongaps: false, text: hover, hovertemplate: "%{text}<extra></extra>", colorbar: { thickness: 10, outlinewidth: 0, tickfont: { color: colourOf("--soft") } } }],
    layout: { annotations, xaxis: axis(xs, a), yaxis: axis(ys, b), margin: { l: 70, r: 12, t: BAR, b: 52 } },
    height: `${Math.max(14, Math.min(40, 7 + 3.4 * ys.length))}rem` };
}
const RESULTS = [["loss", "loss"], ["grad_norm_corrected", "corrected norm"]];
function drawParallel() {
  const members = visible.map(i => ({ i, run: runs[i] })).filter(e => axisOf(e.run) !== null);
  const columns = [...Object.entries(data.fields).map(([name, label]) => ({ label, of: r => r.fields[name], given: true })),
    ...RESULTS.map(([name, label]) => ({ label, of: r => r.signals[name] })), { label: data.metric, of: axisOf }];
  if (members.length < 2) return null;
  const scales = columns.map(c => {
    const values = members.map(e => c.of(e.run) ?? null), numeric = values.every(v => typeof v === "number" || v === null), own = distinct(values);
    if (c.given && own.length <= 12) return { at: v => own.length > 1 ? own.findIndex(o => JSON.stringify(o) === JSON.stringify(v)) / (own.length - 1) : 0.5, ticks: own.map(v => [v, setting(v) || "none"]) };
    if (!numeric) return { at: v => own.indexOf(v) / Math.max(1, own.length - 1), ticks: [] };
    const numbers = values.filter(v => v !== null), low = Math.min(...numbers), high = Math.max(...numbers), logarithmic = low > 0 && high / low > 30;
    const on = v => logarithmic ? Math.log(v) : v;
    return { at: v => high > low ? (on(v) - on(low)) / (on(high) - on(low)) : 0.5, ticks: [low, logarithmic ? Math.sqrt(low * high) : (low + high) / 2, high].map(v => [v, c.given ? setting(v) : short(v)]) };
  });
  const ranked = [...members].sort((p, q) => (data.mode === "min" ? 1 : -1) * (q.run.metric - p.run.metric)); // the best is drawn last
  const x = columns.map((_, i) => i);
  const traces = ranked.map(({ i, run }, rank) => {
    const share = members.length > 1 ? rank / (members.length - 1) : 1, best = rank === members.length - 1;
    return { type: "scatter", mode: "lines+markers", x, y: columns.map((c, k) => { const v = c.of(run); return known(v) ? scales[k].at(v) : null; }), line: { color: best ? colourOf("--bad") : ramp(dark.matches ? share : 1 - share), width: best || state.chosen.has(i) ? 3 : 1.4 }, marker: { size: 4 }, opacity: state.chosen.size && !state.chosen.has(i) ? 0.1 : best ? 1 : 0.75,
      hovertemplate: `${clean(runLabel(run, true))}<br>${clean(data.metric)} ${short(run.metric)}${best ? " ★ best" : ""}<extra></extra>` };
  });
  const annotations = scales.flatMap((s, k) => s.ticks.map(([v, text]) => ({ x: k, y: s.at(v), xanchor: "right", xshift: -6, text: clean(text), showarrow: false, bgcolor: colourOf("--card"), borderpad: 2, font: { size: 11, color: colourOf("--ink") } })));
  const shapes = x.map(k => ({ type: "line", x0: k, x1: k, y0: 0, y1: 1, line: { color: colourOf("--line"), width: 1.5 }, layer: "below" }));
  return { traces, layout: { annotations, shapes, margin: { l: 30, r: 30, t: BAR, b: 40 }, yaxis: { visible: false, range: [-0.06, 1.06] }, xaxis: { tickvals: x, ticktext: columns.map(c => clean(c.label)), range: [-0.45, columns.length - 0.75], showgrid: false, zeroline: false, ticks: "" } } };
}

// ------------------------------------------------------------------------------------- tables
const NUMBER = "number";
const LONG = 40; // characters of a text that is broken into lines
const isLong = v => typeof v === "string" && v.length > LONG;
function cell(c, value, extra = "") { return el("td", { class_: [c.number ? NUMBER : "", c.wrap || isLong(value) ? "wrap" : ""].join(" ").trim() || null, title: c.hint ? c.hint(value) : null }, c.show ? c.show(value) : typeof value === "number" ? short(value) : value ?? "", extra); }
function columnsOf() {
  const has = f => runs.some(r => known(f(r)));
  const columns = [{ key: data.kind === "sweep" ? "trial" : "run", of: r => data.kind === "sweep" && /^\d+$/.test(r.name) ? Number(r.name) : r.name, show: String }];
  for (const [name, label] of Object.entries(data.fields)) columns.push({ key: label, title: name, of: r => r.fields[name], show: setting, number: runs.every(r => typeof r.fields[name] === "number") });
  if (seeded() || data.kind === "sweep") columns.push({ key: "seed", of: r => r.seed, number: true, show: setting });
  columns.push({ key: "status", of: r => r.status, show: v => el("span", { class_: `pill ${v}` }, v) });
  columns.push({ key: "steps", of: r => r.step, number: true, row: r => [bar(r), short(r.step)] });
  columns.push({ key: "samples", of: r => r.samples, number: true });
  columns.push({ key: "metric", title: `${data.metric} at the end, ${data.mode === "min" ? "lower" : "higher"} is better`, label: data.metric, of: axisOf, number: true, row: r => [short(r.metric), r.best ? el("span", { class_: "star", title: "the best" }, "★") : ""] });
  if (data.metric !== "loss") columns.push({ key: "loss", title: "training loss at the end", of: r => r.signals.loss, number: true });
  columns.push({ key: "grad_norm", title: "raw gradient norm at the end", label: "norm, raw", of: r => r.signals.grad_norm, number: true });
  columns.push({ key: "grad_norm_corrected", title: "gradient norm at the end, corrected for noise", label: "norm, corrected", of: r => r.signals.grad_norm_corrected, number: true });
  columns.push({ key: "tokens_per_s", label: "tokens/s", of: r => r.signals.tokens_per_s, number: true });
  columns.push({ key: "memory", title: "the most memory of any device", of: r => r.memory, number: true, row: r => [gigabytes(r.memory)] });
  if (runs.some(r => r.evaluations[data.metric]?.[0].length > 1)) {
    columns.push({ key: "best", title: `the best ${data.metric} of the run`, label: `best ${data.metric}`, of: r => bestOf(r, data.metric)?.value, number: true });
    columns.push({ key: "samples_to_best", label: "samples to it", title: REACH, of: r => bestOf(r, data.metric)?.samples, number: true, row: r => [reach(bestOf(r, data.metric))] });
  }
  const scores = distinct(runs.flatMap(r => Object.keys(r.evaluations))).filter(n => !n.startsWith("eval/")).slice(0, 12);
  for (const name of scores) columns.push({ key: name, title: `the best ${name} of the run's checkpoints`, of: r => bestOf(r, name)?.value, number: true });
  for (const name of distinct(runs.flatMap(r => Object.keys(r.published)))) columns.push({ key: `${name} (paper)`, title: "published for this config", of: r => r.published[name], number: true });
  columns.push({ key: "reason", of: r => r.reason, wrap: true, show: v => el("span", { class_: "clamp", title: v }, v) });
  return columns.filter(c => has(c.of)).map(c => ({ label: c.key, ...c }));
}
function bar(run) {
  const [steps] = run.planned, fill = el("i");
  fill.style.width = `${steps ? Math.min(100, 100 * run.step / steps) : 0}%`;
  return steps ? el("span", { class_: "bar", title: `${short(run.step)} of ${short(steps)} steps` }, fill) : "";
}
function bestOf(run, name) {
  const found = run.evaluations[name];
  if (!found) return null;
  const lower = data.lower.includes(name);
  let at = -1, before = -1, last = -1;
  found[2].forEach((v, i) => {
    if (v === null) return;
    if (at < 0 || (lower ? v < found[2][at] : v > found[2][at])) [at, before] = [i, last];
    last = i;
  });
  return at < 0 ? null : { value: found[2][at], step: found[0][at], samples: found[1][at], after: before < 0 ? 0 : found[1][before] };
}
const REACH = "reached after the first of these numbers of samples and not later than at the second; there is no evaluation between them";
function reach(best) { return best ? `${short(best.after)} to ${short(best.samples)}` : ""; }
/** Heads that sort; `rows` are [item, tr], whose items the columns read. */
function sortable(table, columns, rows) {
  let by = null, down = false;
  const heads = columns.map(c => el("th", { scope: "col", class_: c.number ? NUMBER : null, title: c.title, "aria-sort": "none" }, el("button", { type: "button", onclick: () => sort(c) }, c.label)));
  const body = table.tBodies[0];
  function sort(c, turned = by === c ? !down : false) {
    by = c; down = turned;
    state.sorted[table.id] = { label: c.label, down };
    heads.forEach((h, i) => h.setAttribute("aria-sort", columns[i] === c ? (down ? "descending" : "ascending") : "none"));
    const value = r => c.of(r);
    rows.sort(([p], [q]) => known(value(p)) !== known(value(q)) ? (known(value(p)) ? -1 : 1) : (down ? -1 : 1) * order(value(p), value(q)));
    body.append(...rows.map(([, tr]) => tr));
  }
  table.tHead.replaceChildren(el("tr", {}, ...heads));
  body.replaceChildren(...rows.map(([, tr]) => tr));
  const before = state.sorted[table.id], column = before && columns.find(c => c.label === before.label);
  if (column) sort(column, before.down);
}
function plainTable(headings, rows, numbers = []) {
  const kind = i => numbers.includes(i) ? NUMBER : null;
  return el("div", { class_: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ...headings.map((h, i) => el("th", { scope: "col", class_: kind(i) }, h)))),
    el("tbody", {}, ...rows.map(row => el("tr", {}, ...row.map((v, i) => v instanceof HTMLTableCellElement ? v : el("td", { class_: isLong(v instanceof Node ? v.textContent : v) ? "wrap" : kind(i) }, v instanceof Node ? v : typeof v === "number" ? short(v) : v ?? "")))))));
}

// ------------------------------------------------------------------------------------- the filter
const CONDITION = /^([^<>=!]+)(<=|>=|!=|<|>|=)(.*)$/;
function matches(run, columns, text) {
  const words = columns.map(c => { const v = c.of(run); return typeof v === "number" ? `${setting(v)} ${short(v)}` : String(v ?? ""); }).join(" ").toLowerCase();
  return text.toLowerCase().split(/\s+/).filter(known).every(term => {
    const m = term.match(CONDITION), c = m && columns.find(c => [c.key, c.title, c.label].some(n => n && n.toLowerCase() === m[1]));
    if (!c) return words.includes(term);
    const value = c.of(run), wanted = m[3] === "" ? NaN : Number(m[3]);
    if (!known(value)) return m[2] === "!=";
    const sides = typeof value === "number" && !Number.isNaN(wanted) ? [value, wanted] : [String(value).toLowerCase(), m[3]];
    return { "<": sides[0] < sides[1], ">": sides[0] > sides[1], "<=": sides[0] <= sides[1], ">=": sides[0] >= sides[1], "=": sides[0] === sides[1], "!=": sides[0] !== sides[1] }[m[2]];
  });
}
function makeTrials() {
  const columns = columnsOf(), table = byId("table");
  const rows = runs.map((run, i) => {
    const tr = el("tr", { class_: [run.best ? "best" : "", state.chosen.has(i) ? "chosen" : ""].join(" ").trim() || null, "data-run": run.name, onclick: () => { state.chosen.has(i) ? state.chosen.delete(i) : state.chosen.add(i); tr.classList.toggle("chosen"); showAll(); } },
      ...columns.map(c => c.row ? el("td", { class_: NUMBER }, ...c.row(run)) : cell(c, c.of(run))));
    return [run, tr, i];
  });
  const byRun = new Map(rows.map(([, tr, i]) => [i, tr]));
  sortable(table, columns, rows);
  const filter = () => {
    visible = [];
    runs.forEach((run, i) => {
      const stays = !state.hidden.has(run.status) && matches(run, columns, state.filter);
      byRun.get(i).hidden = !stays;
      if (stays) visible.push(i);
    });
    byId("shown").textContent = visible.length < runs.length ? `${visible.length} of ${runs.length} shown` : `${runs.length} shown`;
  };
  let waiting = 0;
  const later = () => { clearTimeout(waiting); waiting = setTimeout(showAll, 150); };
  byId("filter").oninput = e => { state.filter = e.target.value; filter(); later(); };

  const statuses = distinct(runs.map(r => r.status));
  if (statuses.length > 1) byId("statuses").replaceChildren(...statuses.map(s => {
    const chip = el("button", { type: "button", class_: "chip", "aria-pressed": String(!state.hidden.has(s)), onclick: () => { state.hidden.has(s) ? state.hidden.delete(s) : state.hidden.add(s); chip.setAttribute("aria-pressed", String(!state.hidden.has(s))); filter(); later(); } }, `${s} ${runs.filter(r => r.status === s).length}`);
    return chip;
  }));
  filter();
}

// ------------------------------------------------------------------------------------- the page's parts
function tile(name, value, small = "") { return known(value) && value !== "" ? el("div", {}, el("dt", {}, name), el("dd", {}, value, small ? el("small", {}, small) : "")) : ""; }
function makeHeader() {
  const count = s => runs.filter(r => r.status === s).length, best = runs.find(r => r.best);
  let tiles;
  if (alone) {
    const r = runs[0], [steps, samples] = r.planned, heldOut = r.evaluations["eval/loss"], time = r.grid[2];
    byId("lead").textContent = r.reason || r.folder;
    tiles = [tile("status", r.status), tile("steps", short(r.step), steps ? `of ${short(steps)}` : ""), tile("samples", short(r.samples), samples ? `of ${short(samples)}` : ""),
      tile("loss", short(r.signals.loss), "mean of the latest quarter"), heldOut ? tile("held-out loss", short(heldOut[2][heldOut[2].length - 1]), `best ${short(bestOf(r, "eval/loss").value)} at ${short(bestOf(r, "eval/loss").samples)} samples`) : "",
      tile("throughput", short(r.signals.tokens_per_s), "tokens a second"), tile("device memory", gigabytes(r.memory), "the most of any device so far"), time.length ? tile("training time", duration(time[time.length - 1])) : "",
      ...Object.entries(r.published).map(([n, v]) => tile(`${n}, published`, short(v), "for this config, in the paper"))];
  } else {
    const statuses = distinct(runs.map(r => r.status));
    byId("lead").textContent = `${data.metric}, ${data.mode === "min" ? "lower" : "higher"} is better${data.kind === "sweep" ? ` · ${data.stop ? `stopping rule: ${data.stop}` : "no stopping rule among siblings"}` : ""}`;
    tiles = [tile(data.kind === "sweep" ? "trials" : "runs", String(runs.length), statuses.map(s => `${count(s)} ${s}`).join(", ")),
      best ? tile(`best ${data.metric}`, short(best.metric), `${data.kind === "sweep" ? "trial " : ""}${runLabel(best, true)}`) : "",
      data.kind === "sweep" && known(data.saved) ? tile("samples not trained on", percent(data.saved), "share of the planned samples of ended trials") : "",
      tile("samples in all", short(runs.reduce((a, r) => a + r.samples, 0))),
      known(data.device_hours) ? tile("cost", `${short(Number(data.device_hours.toPrecision(3)))} device hours`, data.certificate ? "for the best arm" : data.critical ? "for the critical batch size" : "") : ""];
  }
  byId("tiles").replaceChildren(...tiles.filter(known));
}
const LOGARITHMIC = ["grad_norm", "grad_norm_corrected", "noise_scale", "noise_scale_low", "update_norm"]; // until their button says otherwise
function makeCurves() {
  for (const [name, { title, note }] of Object.entries(data.signals))
    if (runs.some(r => name in r.means)) figure("charts", name, title, note, drawCurves, LOGARITHMIC.includes(name) || (name === "learning_rate" && !alone));
}
function makeControls() {
  byId("x").querySelector("option[value=flops]").hidden = !runs.some(r => r.grid[3]?.some(v => v > 0));
  byId("x").addEventListener("change", e => { state.x = e.target.value; showAll(); });
  byId("smoothing").value = state.smoothing;
  byId("smoothing").addEventListener("input", e => { state.smoothing = Number(e.target.value); showAll(); });
  document.querySelectorAll(".several").forEach(n => { n.hidden = alone; });
  if (alone) return;
  const choices = [...Object.entries(data.fields), ...(seeded() ? [["seed", "seed"]] : []), ["status", "status"], ["", "run"]];
  state.colour = Object.keys(data.fields)[0] ?? "";
  byId("colour").append(...choices.map(([name, label]) => el("option", { value: name, selected: name === state.colour }, label)));
  byId("colour").addEventListener("change", e => { state.colour = e.target.value; paint(); showAll(); });
  const grouped = new Set(runs.map(r => r.group)).size < runs.length && seeded();
  state.bands = grouped;
  byId("bands-label").hidden = !grouped;
  byId("bands").checked = grouped;
  byId("bands").addEventListener("change", e => { state.bands = e.target.checked; showAll(); });
}
function makeEvaluations() {
  const names = distinct(runs.flatMap(r => Object.keys(r.evaluations)));
  if (!names.length) return;
  const select = byId("evaluation"), first = names.includes(data.metric) ? data.metric : names[0], before = new Set([...select.options].map(o => o.value));
  select.append(...names.filter(n => !before.has(n)).map(n => el("option", { selected: !before.size && n === first }, n)));
  if (!before.size) figure("evaluation-charts", "evaluation", first, "", entry => { entry.name = select.value; entry.node.querySelector("b").textContent = select.value; return drawCurves(entry); });
  select.onchange = () => showAll(figures.filter(f => f.node.parentNode.id === "evaluation-charts"));
  const items = names.map(name => {
    const lower = data.lower.includes(name), all = runs.map(r => ({ run: r, ...bestOf(r, name) })).filter(b => known(b.value));
    const best = all.reduce((p, q) => p && (lower ? p.value <= q.value : p.value >= q.value) ? p : q, null), values = runs[0].evaluations[name]?.[2] ?? [];
    return best && { name, best: best.value, run: best.run.name, step: best.step, samples: best.samples, after: best.after, last: values[values.length - 1] };
  }).filter(known);
  const columns = [{ label: "evaluation", of: r => r.name }, ...(alone ? [{ label: "last", of: r => r.last, number: true }] : [{ label: data.kind === "sweep" ? "best trial" : "best run", of: r => r.run }]),
    { label: "best", of: r => r.best, number: true }, { label: "at step", of: r => r.step, number: true }, { label: "samples to it", title: REACH, of: r => r.samples, number: true, row: r => [reach(r)] }];
  sortable(byId("best"), columns, items.map(r => [r, el("tr", {}, ...columns.map(c => c.row ? el("td", { class_: NUMBER }, ...c.row(r)) : cell(c, c.of(r))))]));
}
/** What the model wrote to held-out prompts before its training, and what it writes now. */
function makeAnswers() {
  if (!data.answers.length) return;
  const right = a => data.answers.filter(q => q[a].text === q.expected).length, [{ first, last }] = data.answers, text = v => el("td", { class_: "wrap answer" }, v);
  const given = (q, a) => el("td", { class_: `wrap answer ${a.text === q.expected ? "right" : ""}` }, a.text);
  byId("answers-body").replaceChildren(el("p", { class_: "note" }, `Written by the likeliest tokens${first.step < last.step ? ` at step ${short(first.step)} and at step ${short(last.step)}` : ` at step ${short(last.step)}`}. ${right("last")} of ${data.answers.length} are as in the data${first.step < last.step ? `, ${right("first")} at first` : ""}; these are marked.`),
    plainTable(["source", "prompt", "in the data", ...(first.step < last.step ? [`at step ${short(first.step)}`] : []), `at step ${short(last.step)}`], data.answers.map(q => [q.source, text(q.prompt), text(q.expected), ...(first.step < last.step ? [given(q, q.first)] : []), given(q, q.last)])));
}
function drawFrontier() {
  const members = visible.map(i => ({ i, run: runs[i] })).filter(e => e.run.frontier);
  const traces = members.map(({ i, run }) => {
    const f = run.frontier, fill = alone ? mainColour() : colour(run), last = f.kept.length - 1;
    return { type: "scatter", mode: "lines+markers", x: f.learned, y: f.kept, name: clean(runLabel(run, true)), line: { color: faint(fill, 0.45), width: 1 }, marker: { color: fill, size: f.kept.map((_, k) => k === last ? 9 : 3) }, opacity: state.chosen.size && !state.chosen.has(i) ? 0.12 : 1,
      text: f.samples.map(n => `${short(n)} samples`), hovertemplate: `%{text}<br>learned %{x:.3f}, kept %{y:.3f}<extra>${clean(alone ? "" : runLabel(run, true))}</extra>` };
  });
  return { traces, layout: { xaxis: { title: { text: "learned" } }, yaxis: { title: { text: "kept" } } } };
}
function makeFrontier() {
  const first = runs.find(r => r.frontier);
  if (!first) return;
  const what = first.frontier.metric === "exact_match" ? "exact match" : "token accuracy";
  figure("frontier-charts", "frontier", "Learned against kept", `${what} of the other held-out sources, and that of eval.retain as a share of what it was before the first step; the large point is the last evaluation`, drawFrontier);
}
function makeGrid() {
  const fields = Object.keys(data.fields).filter(n => distinct(runs.map(r => r.fields[n])).length > 1);
  const [a, b] = [byId("grid-x"), byId("grid-y")];
  if (alone || !fields.length || a.options.length === fields.length) return;
  a.replaceChildren();
  b.replaceChildren();
  a.append(...fields.map((n, i) => el("option", { value: n, selected: i === 0 }, data.fields[n])));
  b.append(...(fields.length < 2 ? [el("option", { value: "" }, "(the metric)")] : []), ...fields.slice(fields.length < 2 ? 1 : 0).map((n, i) => el("option", { value: n, selected: i === 1 }, data.fields[n])));
  if (fields.length < 2) byId("grid").querySelector("h2").textContent = "The metric by the axis";
  figure("grid-charts", "grid", data.metric, "mean over seeds; ★ the best", drawGrid);
  [a, b].forEach(s => { s.onchange = () => showAll(figures.filter(f => f.node.parentNode.id === "grid-charts")); });
  figure("parallel-charts", "parallel", "All completed runs", "", drawParallel);
}
function makeEvidence() {
  const found = data.evidence;
  if (!found) return;
  const body = byId("evidence-body"), fractions = found.fractions;
  body.replaceChildren();
  body.append(el("p", { class_: "note" }, `What signals and rules would have shown at ${fractions.map(spaced).join(", ")} of the run, measured on the completed runs${found.left_out ? ` (${found.left_out} others are left out, because they have no end to compare with)` : ""}. ` +
    `Spearman correlation over arms with the final ${data.metric}, and its ${percent(found.level)} interval: an arm is the mean of its seeds, ranked within its batch size. Bold: q is at most 5 %, adjusted to the whole table. Everything here is an exploration, none of it a verdict.`));
  Object.entries(found.groups).forEach(([name, group], i) => {
    const partial = Object.values(group.signals).some(of => Object.values(of).some(c => known(c.given_rate)));
    const correlations = Object.keys(group.signals).length ? [el("h3", {}, "How well a signal ranks the arms as their end does"), correlationTable(group, fractions), ...(partial ? [el("h3", {}, "The same, given the learning rate"), el("p", { class_: "note" }, "The rate sets both the signal and the end. This is what is left where the rank of the rate is taken out of both."), correlationTable(group, fractions, true)] : [])] : [];
    const parts = [...correlations, el("h3", {}, "What a rule would have saved and lost"), ruleTable(group, fractions)];
    const title = `${name === "all" ? "All runs" : name} (${group.runs})`;
    body.append(i ? el("details", {}, el("summary", {}, title), ...parts) : el("div", {}, ...parts));
  });
}
const VERDICT_PILLS = { supported: "completed", refuted: "failed", "cannot be told": "stopped" };
const signed = v => known(v) ? (v > 0 ? "+" : "") + short(Number(v.toPrecision(3))).replace("-", "−") : "–";
const probability = v => !known(v) ? "–" : v < 0.0001 ? "< 0.0001" : v.toPrecision(2);
function makeClaims() {
  const found = data.claims;
  if (!found) return;
  const body = byId("claims-body"), level = percent(found.level);
  body.replaceChildren();
  body.append(el("p", { class_: "note" }, `Registered ${found.registered.slice(0, 16).replace("T", " ")} UTC, before the first run (SHA-256 ${found.sha256.slice(0, 12)}). p is adjusted by Holm's procedure to the number of claims; a verdict needs ${level} or less. ` +
    "Detectable is the true difference that is found with a power of 80 % (for claims of the kind alike, the margin within which equal arms are found alike). Only these claims get verdicts."));
  const table = (rows, judged) => plainTable(["claim", ...(judged ? ["verdict"] : []), "difference", judged ? "p, adjusted" : "q", "detectable", "pairs", "device hours"], rows.map(c => [
    el("td", { class_: "wrap" }, el("b", {}, c.name), el("p", { class_: "quiet" }, `${c.metric}, ${c.kind === "alike" ? `alike within ${short(c.margin)}` : c.mode === "min" ? "lower is better" : "higher is better"}: ${c.contrast}`),
      ...[c.reason, ...c.notes].filter(known).map(text => el("p", { class_: "quiet" }, text))),
    ...(judged ? [el("td", {}, el("span", { class_: `pill ${VERDICT_PILLS[c.verdict]}` }, c.verdict))] : []),
    el("td", { class_: "number" }, signed(c.mean), known(c.low) ? el("div", { class_: "quiet" }, `[${signed(c.low)}, ${signed(c.high)}] at ${percent(c.confidence)}`) : ""),
    probability(c.adjusted), known(c.detectable) ? short(c.detectable) : "–", c.pairs ? `${c.pairs} ${c.unit}` : "–", known(c.device_hours) ? short(Number(c.device_hours.toPrecision(3))) : "–"]), judged ? [2, 3, 4, 5, 6] : [1, 2, 3, 4, 5]);
  if (found.judged.length) body.append(table(found.judged, true));
  if (found.explored.length) body.append(el("h3", {}, "Explorations"), el("p", { class_: "note" }, "Registered as explorations: q is adjusted by the procedure of Benjamini and Hochberg. They suggest what to test next and get no verdict."), table(found.explored, false));
}
function makeCertificate() {
  const found = data.certificate;
  if (!found) return;
  const named = values => Object.entries(values).map(([axis, v]) => `${data.fields[axis] ?? axis} ${setting(v)}`).join(", ");
  const row = (where, rival) => [where, rival ? named(rival.values) : "the end of the axis", rival && known(rival.lag) ? el("td", { class_: "number" }, signed(rival.lag), known(rival.low) ? el("div", { class_: "quiet" }, `[${signed(rival.low)}, ${signed(rival.high)}] at 95 %`) : "") : rival ? rival.status : "", rival && rival.seeds ? rival.seeds : ""];
  byId("certificate-body").replaceChildren(el("p", { class_: "note" }, `${named(found.values)}: ${found.metric} ${short(found.mean)}, the mean of ${found.seeds} ${found.seeds > 1 ? "seeds" : "seed"}. ${percent(found.saved)} of the samples of the whole grid were not run. The lag of another arm is by how much it is worse, by the seeds with which both were finished; two seeds or fewer give no interval. The arm was chosen by these seeds, so the intervals describe and are no verdict.`),
    plainTable(["compared with", "arm", "lag", "seeds"], [...found.brackets.flatMap(b => [row(`next lower ${data.fields[b.axis] ?? b.axis}`, b.lower), row(`next higher ${data.fields[b.axis] ?? b.axis}`, b.higher)]), ...(found.runner_up ? [row("runner-up", found.runner_up)] : [])], [2, 3]),
    ...(found.notes.length ? [el("ul", {}, ...found.notes.map(text => el("li", {}, text)))] : []));
}
function makeViews() {
  const found = data.views;
  if (!found) return;
  const units = Object.keys(found.budget), label = { samples: "samples", steps: "updates", flops: "FLOPs" };
  const named = name => { const run = runs.find(r => r.name === name); return run ? runLabel(run, true) : name; };
  const rows = found.runs.map((name, i) => [named(name), ...units.map(u => found.at_budget[u][i]), ...units.map(u => known(found.to_target[u][i]) ? found.to_target[u][i] : "–")]);
  byId("views-body").replaceChildren(el("p", { class_: "note" }, `${data.metric} of completed runs, compared by what is equal: ${units.map(u => `${short(found.budget[u])} ${label[u]}`).join(", ")} (as much as each of these runs has had), and by what a run needs to ${short(found.target)}, the median of their ends. Between two evaluations the metric is taken to be on a line.`),
    plainTable(["run", ...units.map(u => `at equal ${label[u]}`), ...units.map(u => `${label[u]} to target`)], rows, rows[0].map((_, i) => i).slice(1)));
}
function makeCritical() {
  const found = data.critical;
  if (!found) return;
  const metrics = Object.keys(found.excesses), bound = e => known(e.low) ? `[${signed(e.low)}, ${signed(e.high)}]` : "";
  const cellOf = e => el("td", { class_: "number" }, known(e.mean) ? signed(e.mean) : "diverged", known(e.mean) ? el("div", { class_: "quiet" }, bound(e)) : "");
  byId("critical-body").replaceChildren(...found.sentences.map(text => el("p", {}, text)),
    el("p", { class_: "note" }, `Each number is by how much a batch size ends above the smallest after equally many samples, paired over ${found.seeds} ${found.seeds > 1 ? "seeds" : "seed"}, with the one-sided bounds that decide the interval at ${percent(1 - found.level)}. Of several arms of one batch size, the best one counts, chosen by these seeds. The training loss is the mean of the last quarter.`),
    plainTable(["batch size", ...metrics], found.batch_sizes.map((b, i) => [b, ...metrics.map(m => cellOf(found.excesses[m][i]))]), [0]));
}
const spaced = f => f.replace("%", " %");
const TITLES = name => name === "eval/loss" ? "held-out loss" : data.signals[name]?.title ?? name;
function correlationTable(group, fractions, givenRate = false) {
  const rows = Object.entries(group.signals).map(([name, byFraction]) => [TITLES(name), ...fractions.map(f => {
    const c = byFraction[f], rho = c && (givenRate ? c.given_rate : c.rho), q = c && (givenRate ? c.q_given_rate : c.q);
    if (!known(rho)) return el("td", { class_: "number weak" }, "–");
    const found = known(q) && q <= 0.05, sign = v => v.toFixed(2).replace("-", "−"), hasInterval = !givenRate && known(c.low);
    return el("td", { class_: `number ${found ? "" : "weak"}`, title: `${c.arms} arms, q ${probability(q)}` }, el("span", { class_: found ? "strong" : null }, sign(rho)), hasInterval ? ` [${sign(c.low)}, ${sign(c.high)}]` : "");
  })]);
  return plainTable(["signal", ...fractions.map(f => `at ${spaced(f)}`)], rows, fractions.map((_, i) => i + 1));
}
function ruleTable(group, fractions) {
  const rows = Object.entries(group.rules).flatMap(([rule, byFraction]) => fractions.filter(f => byFraction[f]).map((f, i) => {
    const v = byFraction[f];
    return [i ? "" : rule.replace(/Rule$/, ""), spaced(f), `${v.stopped} of ${v.runs}`, percent(v.saved), known(v.regret) ? short(v.regret) : "–", el("td", {}, v.winner_killed ? el("span", { class_: "pill failed" }, "killed") : el("span", { class_: "pill completed" }, "kept"))];
  }));
  return plainTable(["rule", "at", "runs stopped", "compute saved", `regret, in ${data.metric}`, "the winner"], rows, [1, 2, 3, 4]);
}
function makeEvents() {
  if (!alone) return;
  const r = runs[0], start = r.events.length ? r.events[0].time : null;
  const rows = [...r.phases.filter(() => r.phases.length > 1).map(([name, first]) => ({ step: first, what: `phase ${name} begins` })), ...r.checkpoints.map(step => ({ step, what: "checkpoint" })),
    ...r.events.map(e => ({ step: e.step, what: String(e.event), time: e.time }))].sort((a, b) => a.step - b.step || (a.time ?? 0) - (b.time ?? 0));
  if (["stopped", "failed", "preempted", "paused"].includes(r.status) && !r.events.some(e => e.event === r.status)) rows.push({ step: r.step, what: r.status });
  if (!rows.length) return;
  const last = rows.map(e => e.what).lastIndexOf(r.status), at = rows.map(e => known(e.time) ? new Date(e.time * 1000).toLocaleString("sv") : "");
  const section = byId("events");
  section.querySelector(".scroll").replaceWith(plainTable(["step", "what", "when", ""], rows.map((e, i) => [e.step, e.what, at[i], el("td", { class_: "wrap" }, i === last ? r.reason : "")]), [0]));
}
function makeData() {
  const tables = data.data[0];
  if (!tables || !tables.sources.length) return;
  const of = rows => { const names = Object.keys(rows[0]); return plainTable(names, rows.map(r => names.map(n => r[n])), names.map((n, i) => typeof rows[0][n] === "number" ? i : -1)); };
  byId("data-body").replaceChildren(of(tables.sources), el("h3", {}, "What is drawn"), ...(tables.phases.length ? [of(tables.phases)] : []), known(tables.packing) ? el("p", { class_: "quiet" }, `${percent(tables.packing)} of the slots of its first steps hold tokens.`) : "");
}
function makeConfig() {
  const c = data.config, body = byId("config-body");
  body.replaceChildren();
  if (!c.fields.length && !c.differing.length) return;
  const value = v => el("td", { class_: "wrap mono" }, setting(v) === "" ? "\"\"" : setting(v));
  if (!alone) {
    if (!c.differing.length) body.append(el("p", { class_: "note" }, "All runs have the same config."));
    else if (c.runs.length) body.append(el("p", { class_: "note" }, "What differs."), plainTable(["field", ...c.runs], c.differing.map(d => [el("td", { class_: "mono" }, d.name), ...d.values.map(v => el("span", { class_: "changed mono" }, known(v) ? setting(v) : "none"))])));
    else body.append(el("p", { class_: "note" }, "Fields that differ, and how many runs have each value."), plainTable(["field", "values"], c.differing.map(d => [el("td", { class_: "mono" }, d.name), el("td", { class_: "wrap" }, ...d.counts.slice(0, 40).flatMap(([v, n]) => [el("span", { class_: "changed mono" }, known(v) ? setting(v) : "none"), ` × ${n}  `]), d.counts.length > 40 ? `and ${d.counts.length - 40} more` : "")])));
  }
  const rows = c.fields.map(f => [el("td", { class_: "mono" }, f.name), f.changed ? el("td", { class_: "wrap" }, el("span", { class_: "changed mono" }, setting(f.value) || "\"\"")) : value(f.value), el("td", { class_: "mono weak" }, f.changed ? (known(f.default) ? setting(f.default) : "") : "")]);
  const table = plainTable(["field", "value", "default, where it differs"], rows), title = alone ? "" : "Equal in all runs";
  body.append(alone ? table : el("details", {}, el("summary", {}, title), table));
  if (data.provenance.length) body.append(el("details", {}, el("summary", {}, "Provenance: command, commit, versions, automatic choices"), plainTable(["", ""], data.provenance.map(([k, v]) => [el("td", { class_: "mono" }, k), el("td", { class_: "wrap mono" }, v)]))));
}
function makeProblems() {
  byId("problems").querySelector("ul").replaceChildren(...data.problems.map(p => el("li", {}, p.run ? el("b", {}, `${p.run}: `) : "", p.text)));
  byId("warnings").querySelector("ul").replaceChildren(...data.warnings.map(w => el("li", {}, w.runs ? el("b", {}, `${w.runs}: `) : "", w.text)));
}

// ------------------------------------------------------------------------------------- all of it
const has = id => byId(id).childElementCount > 0;
/** Which sections have something to show. */
const needs = () => ({ problems: data.problems.length, warnings: data.warnings.length, claims: data.claims, certificate: data.certificate, critical: data.critical, trials: !alone, curves: has("charts"), evaluations: has("evaluation-charts"), answers: data.answers.length, views: data.views, frontier: has("frontier-charts"), grid: has("grid-charts"),
  parallel: has("parallel-charts") && runs.filter(r => axisOf(r) !== null).length > 1, evidence: data.evidence, events: byId("events").querySelector("tbody").childElementCount, "data-section": has("data-body"), config: has("config-body") });
/** The parts of the page, each with what it is made from: a refresh leaves those alone of which nothing is new. */
const PARTS = [[makeHeader, () => [data.runs, data.saved]], [makeProblems, () => [data.problems, data.warnings]], [makeClaims, () => data.claims], [makeCertificate, () => data.certificate], [makeCritical, () => data.critical], [makeCurves, () => data.runs], [makeEvaluations, () => data.runs], [makeAnswers, () => data.answers], [makeViews, () => [data.views, data.runs]], [makeFrontier, () => data.runs], [makeGrid, () => data.runs],
  [makeEvidence, () => data.evidence], [makeEvents, () => data.runs], [makeData, () => data.data], [makeConfig, () => [data.config, data.provenance]]];
const every = Number(document.documentElement.dataset.refreshS ?? 0); // seconds between refreshes, 0 for none
const made = new Map();
function make() {
  for (const [part, of] of PARTS) {
    const from = every ? JSON.stringify(of()) : "";
    if (made.get(part) === from) continue;
    made.set(part, from);
    part();
  }
  if (!alone) { paint(); makeTrials(); }
  byId("nav").replaceChildren(...Object.entries(needs()).map(([id, there]) => {
    byId(id).hidden = !there;
    return there ? el("a", { href: `#${id}` }, byId(id).dataset.nav) : "";
  }).filter(known));
}
make();
makeControls();
if (!alone) paint();
showAll();
dark.addEventListener("change", () => { if (!alone) paint(); showAll(); });

// ------------------------------------------------------------------------------------- while it is served
/** Draws what is new in place, so that the reader keeps the scroll, the zoom, the order of the tables and the filter. */
function refresh(fresh) {
  const chosen = new Set([...state.chosen].map(i => runs[i].name));
  [data, runs] = [fresh, fresh.runs];
  state.chosen = new Set(runs.map((_, i) => i).filter(i => chosen.has(runs[i].name)));
  visible = runs.map((_, i) => i);
  make();
  showAll();
}
let shown = null; // the tag of the content that is drawn
async function poll(seconds) {
  if (!document.hidden) {
    let said = "the server of this page does not answer";
    try {
      const answer = await fetch("content", { cache: "no-cache" });
      if (answer.ok) {
        said = "live";
        const tag = answer.headers.get("ETag");
        if (tag !== shown) refresh(await answer.json());
        shown = tag;
      }
    } catch { /* it has ended, or is busy */ }
    byId("made").textContent = `${said} · ${new Date().toLocaleTimeString("sv")}`;
  }
  setTimeout(poll, 1000 * seconds, seconds);
}
if (every) setTimeout(poll, 1000 * every, every);
})();
