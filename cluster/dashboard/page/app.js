// The page: asks for the state once a second and hands it to its parts.
import { Chart } from "./charts.js";
import { clock, short } from "./format.js";
import { HeatMap } from "./heatmap.js";
import { balanceTerms, History, quantile } from "./history.js";
import { cellText, describeCell, set, showCell, showEvents, showRanks, showRebalance, showShards, showTiles, showWorkers } from "./panels.js";

const INTERVAL_MS = 1000;
const TIMEOUT_MS = 20000;
const RATE_S = 5; // rates and quantiles are of the last so many seconds
const BALANCE_S = 10;
const byId = (id) => document.getElementById(id);

const history = new History();
const heatmap = new HeatMap(byId("heatmap"));
const charts = {
  tokens: new Chart("tokens", ["generated", "prompt"], short),
  requests: new Chart("requests", ["running", "waiting"], short),
  balance: new Chart("balance", ["expert", "shard", "rows"], (value) => `${Number(value.toFixed(2))}×`, { even: true }),
  latency: new Chart("latency", ["first token", "between"], short),
};
const page = { state: null, placement: null, lastEvent: 0, isPaused: false, lit: null, failedSince: null };
// What an update cost, for whoever looks: milliseconds of script, from the answer's text to the last pixel handed over.
const updates = { count: 0, milliseconds: [] };
window.mobula = { updates, page, heatmap };

async function poll() {
  if (!page.isPaused) {
    try {
      const known = page.placement?.placement_version ?? 0;
      const answer = await fetch(`/api/state?placement=${known}&event=${page.lastEvent}`, { signal: AbortSignal.timeout(TIMEOUT_MS) });
      if (!answer.ok) throw new Error(`the gateway answered ${answer.status}`);
      const text = await answer.text();
      const begin = performance.now();
      update(JSON.parse(text));
      await null; // charts draw at the end of this task
      note(performance.now() - begin);
    } catch (error) {
      disconnect(error);
    }
  }
  setTimeout(poll, INTERVAL_MS);
}

function update(state) {
  page.state = state;
  page.failedSince = null;
  document.body.classList.remove("stale");
  if (state.placement) {
    page.placement = state.placement;
    heatmap.place(state.placement);
  }
  showHeader(state);
  showEvents(state.events);
  page.lastEvent = state.events.at(-1)?.number ?? page.lastEvent;
  showRebalance(state.status);
  showWorkers(state);
  if (state.load) history.add(state);
  const recent = state.load ? history.window(RATE_S) : null;
  const balanced = state.load ? history.window(BALANCE_S) : null;
  const terms = balanced ? balanceTerms(balanced) : { expert: NaN, shard: NaN, rows: NaN };
  showTiles(state, recent, terms);
  showLoad();
  if (recent) addPoints(state, recent, terms);
}

function addPoints(state, recent, terms) {
  const workers = Object.values(state.metrics.workers);
  const sum = (name) => workers.reduce((total, worker) => total + (worker[name] ?? 0), 0);
  const rate = (name) => recent.counters[name] / recent.seconds;
  const p95 = (name) => 1e3 * quantile(recent.histograms[name], 0.95);
  charts.tokens.add(state.time_s, [rate("generation_tokens"), rate("prompt_tokens")]);
  charts.requests.add(state.time_s, [sum("num_running"), sum("num_waiting")]);
  charts.balance.add(state.time_s, [terms.expert, terms.shard, terms.rows]);
  charts.latency.add(state.time_s, [p95("time_to_first_token"), p95("inter_token_latency")]);
}

function showHeader(state) {
  const model = state.model;
  if (model) set("model", `${model.model_id} · ${model.dp_size} worker${model.dp_size === 1 ? "" : "s"}, ${model.ep_size} shards · ${model.version}`);
  document.title = model ? `${model.model_id} · Mobula` : "Mobula";
  if (state.status) set("state", state.status.is_serving ? "serving" : "degraded", state.status.is_serving ? "good" : "bad");
  else set("state", "no controller", "bad");
  const version = state.status?.placement_version ?? state.load?.placement_version;
  set("placement", version === undefined ? "" : `placement ${version}`);
  const banner = byId("banner");
  const faults = Object.entries(state.errors).map(([what, why]) => `${what}: ${why}`);
  banner.hidden = !faults.length;
  banner.classList.remove("calm");
  if (faults.length) set("banner", `Not everything can be shown just now. ${faults.join("; ")}`);
}

const chosenWindow = () => {
  const value = document.querySelector("input[name=window]:checked").value;
  return value === "all" ? value : Number(value);
};

function showLoad() {
  const state = page.state;
  const window = state?.load ? history.window(chosenWindow()) : null;
  const empty = byId("heat-empty");
  if (!window) {
    empty.textContent = state?.errors.load ? "Expert load is not available." : "counting the first seconds …";
    return;
  }
  heatmap.show(window, state.load.layer_ids);
  const isIdle = !window.tokens.some((value) => value);
  empty.textContent = isIdle ? "No tokens in this window. Send a request, or choose “all”." : "";
  const { layers, experts } = window;
  const span = window.seconds ? `last ${Math.round(window.seconds)} s` : "since start";
  set("load-subtitle", `${layers} layers (down) × ${experts} experts · ${span}`);
  showLegend();
  showRanks(window, state.load.dispatch.max_ranks_per_token);
  showShards(state, window, lightShard);
  showCursor();
  if (heatmap.kept) showCell(cellAt(heatmap.kept));
}

function cellAt({ layer, expert }) {
  const window = history.window(chosenWindow());
  const tokens = window ? window.tokens[layer * window.experts + expert] : 0;
  return describeCell(page.state, page.placement, layer, expert, tokens, heatmap.relative(layer, expert));
}

function showCursor() {
  const tip = byId("tip");
  tip.hidden = !heatmap.cursor || !page.placement;
  if (tip.hidden) return;
  tip.textContent = cellText(cellAt(heatmap.cursor));
  const { x, y } = heatmap.positionOf(heatmap.cursor);
  const width = byId("heatmap").clientWidth;
  tip.style.left = `${Math.max(0, Math.min(x + 10, width - tip.offsetWidth))}px`;
  tip.style.top = `${y + 8}px`;
}

function showLegend() {
  const canvas = byId("legend");
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, 1);
  const pixels = new Uint32Array(image.data.buffer);
  pixels.forEach((_, x) => { pixels[x] = heatmap.colours[Math.round(Math.sqrt(x / (canvas.width - 1)) * 255)]; });
  for (let y = 0; y < canvas.height; y++) context.putImageData(image, 0, y);
  set("legend-ticks", `0× to ${heatmap.scale}×`);
}

function lightShard(button) {
  const rank = Number(button.dataset.name.slice("shard-".length));
  page.lit = page.lit === rank ? null : rank;
  for (const other of byId("shards").querySelectorAll("button")) other.ariaPressed = String(other.dataset.name === `shard-${page.lit}`);
  heatmap.light(page.lit);
}

function note(milliseconds) {
  updates.count += 1;
  updates.milliseconds.push(milliseconds);
  if (updates.milliseconds.length > 120) updates.milliseconds.shift();
  set("updated", `updated ${clock(page.state.time_s)}`);
  set("cost", `${milliseconds.toFixed(1)} ms to draw`);
}

function disconnect(error) {
  page.failedSince ??= Date.now() / 1e3;
  document.body.classList.add("stale");
  set("state", "disconnected", "bad");
  const banner = byId("banner");
  banner.hidden = false;
  banner.classList.remove("calm");
  set("banner", `No answer from the gateway since ${clock(page.failedSince)}; trying again each second. (${error.message})`);
}

function applyTheme(choice) {
  const system = matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.toggleAttribute("data-dark", choice === "dark" || (choice === "auto" && system));
  document.documentElement.dataset.theme = choice;
  const button = byId("theme");
  button.textContent = choice[0].toUpperCase() + choice.slice(1);
  button.ariaLabel = `Theme: ${choice === "auto" ? "as the system" : choice}`;
  heatmap.recolour();
  for (const chart of Object.values(charts)) if (page.state) chart.build();
  if (page.state) showLegend();
}

byId("theme").addEventListener("click", () => {
  const next = { auto: "dark", dark: "light", light: "auto" }[document.documentElement.dataset.theme];
  localStorage.setItem("theme", next);
  applyTheme(next);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => applyTheme(document.documentElement.dataset.theme));
byId("pause").addEventListener("click", (event) => {
  page.isPaused = !page.isPaused;
  event.target.ariaPressed = String(page.isPaused);
  event.target.textContent = page.isPaused ? "Resume" : "Pause";
  const banner = byId("banner");
  banner.hidden = !page.isPaused;
  banner.classList.toggle("calm", page.isPaused);
  if (page.isPaused) set("banner", `Paused at ${clock(Date.now() / 1e3)}.`);
});
for (const input of document.querySelectorAll("input[name=window]")) input.addEventListener("change", showLoad);
for (const input of document.querySelectorAll("input[name=colour]")) input.addEventListener("change", () => {
  heatmap.colourBy(input.value === "shard");
  set("legend-text", input.value === "shard" ? "hue: shard; strength: tokens over the layer's mean" : "tokens of an expert over its layer's mean");
});

const canvas = byId("heatmap");
canvas.addEventListener("pointermove", (event) => {
  if (event.pointerType !== "mouse") return; // a finger would cover what it points at
  heatmap.cursor = heatmap.at(event.offsetX, event.offsetY);
  heatmap.draw();
  showCursor();
});
canvas.addEventListener("pointerleave", () => { heatmap.cursor = null; heatmap.draw(); showCursor(); });
canvas.addEventListener("click", (event) => keep(heatmap.at(event.offsetX, event.offsetY)));
canvas.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (event.key === "Enter" && heatmap.cursor) keep(heatmap.cursor);
  if (!step) return;
  event.preventDefault();
  heatmap.move(...step);
  showCursor();
});

function keep(cell) {
  if (!cell || !page.placement) return;
  heatmap.kept = cell;
  heatmap.draw();
  showCell(cellAt(cell));
}

new ResizeObserver(() => { heatmap.resize(); for (const chart of Object.values(charts)) chart.resize(); }).observe(document.querySelector("main"));
applyTheme(localStorage.getItem("theme") ?? "auto");
showEvents([]);
poll();
