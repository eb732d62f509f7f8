// Everything on the page that is text: tiles, rows of shards and workers, the kept expert, the log.
import { bytes, clock, count, percent, seconds, short, times } from "./format.js";
import { quantile } from "./history.js";
import { css, shardColour } from "./palette.js";

const byId = (id) => document.getElementById(id);

export function set(id, text, kind = "") {
  const element = byId(id);
  if (element.textContent !== text) element.textContent = text;
  if (element.dataset.kind !== kind) {
    element.classList.remove("good", "bad");
    if (kind) element.classList.add(kind);
    element.dataset.kind = kind;
  }
}

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

export function showTiles(state, recent, terms) {
  const workers = Object.values(state.metrics.workers);
  const sum = (name) => workers.reduce((total, worker) => total + (worker[name] ?? 0), 0);
  set("tile-running", count(sum("num_running")));
  set("tile-waiting", `${count(sum("num_waiting"))} waiting · ${count(state.metrics.counters.requests_failed)} failed`);
  const usages = workers.map((worker) => worker.cache_usage_ratio ?? 0);
  set("tile-cache", usages.length ? percent(Math.max(...usages)) : "–");
  set("tile-cache-detail", `${count(state.metrics.counters.preemptions)} preempted`);
  const violations = state.metrics.counters.device_limit_violations;
  set("tile-violations", violations ? `${count(violations)} over the limit` : "never over the limit", violations ? "bad" : "good");
  if (!recent?.seconds) return;
  set("tile-generated", short(recent.counters.generation_tokens / recent.seconds));
  set("tile-prompt", `${short(recent.counters.prompt_tokens / recent.seconds)} prompt tokens/s`);
  set("tile-ttft", seconds(quantile(recent.histograms.time_to_first_token, 0.95)));
  set("tile-itl", `${seconds(quantile(recent.histograms.inter_token_latency, 0.95))} between tokens`);
  set("tile-balance", Number.isFinite(terms.shard) ? (1 / terms.shard).toFixed(2) : "–");
  set("tile-hottest", Number.isFinite(terms.shard) ? "1 is even" : "no traffic just now");
}

export function showRanks(window, limit) {
  const total = window.ranks.reduce((sum, value) => sum + value, 0);
  const mean = window.ranks.reduce((sum, value, ranks) => sum + ranks * value, 0) / total;
  set("tile-ranks", total ? mean.toFixed(2) : "–");
  set("tile-limit", `of at most ${limit}`);
  const host = byId("ranks");
  const rows = Math.max(limit, window.ranks.length - 1);
  if (host.childElementCount !== rows + 1) {
    host.replaceChildren(...Array.from({ length: rows }, (_, index) => meterRow(String(index + 1))));
    host.children[limit - 1].after(element("div", "limit", `the limit is ${limit}`));
  }
  for (let ranks = 1; ranks <= rows; ranks++) {
    const row = host.children[ranks <= limit ? ranks - 1 : ranks];
    const part = total ? (window.ranks[ranks] ?? 0) / total : 0;
    row.classList.toggle("over", ranks > limit);
    fill(row.children[1], part);
    row.children[2].textContent = percent(part);
  }
}

function meterRow(label) {
  const row = element("div");
  row.append(element("span", "", label), meter(), element("span"));
  return row;
}

function meter(withMean = false) {
  const made = element("div", "meter");
  made.append(document.createElement("i"));
  if (withMean) made.append(document.createElement("u"));
  return made;
}

const fill = (made, part) => { made.firstChild.style.transform = `scaleX(${Math.max(0, Math.min(1, part))})`; };

// Rows that stay while their names stay, so that focus and pointer do too.
function rows(host, names, withMean, onPress) {
  if (host.dataset.names === names.join()) return;
  host.dataset.names = names.join();
  host.classList.toggle("dense", names.length > 10);
  host.replaceChildren(...names.map((name) => {
    const button = element("button");
    button.type = "button";
    button.dataset.name = name;
    button.ariaPressed = "false";
    button.append(element("span", "swatch"), element("span", "name", name), meter(withMean), element("span", "value"), element("span", "note"));
    button.addEventListener("click", () => onPress(button));
    const item = document.createElement("li");
    item.append(button);
    return item;
  }));
}

function fillRow(item, { colour, part, value, note, isBad, label }) {
  const [swatch, , bar, number, text] = item.firstChild.children;
  swatch.style.background = colour;
  fill(bar, part);
  bar.firstChild.style.background = colour;
  number.textContent = value;
  text.textContent = note;
  text.classList.toggle("bad", isBad);
  item.firstChild.ariaLabel = label;
  item.firstChild.title = label;
}

export function showShards(state, window, onPress) {
  const processes = new Map((state.status?.processes ?? []).map((process) => [process.name, process]));
  const shards = state.load.shards;
  const host = byId("shards");
  rows(host, shards.map((shard) => `shard-${shard.ep_rank}`), true, onPress);
  const total = [...window.shards.values()].reduce((sum, shard) => sum + shard.assignments, 0);
  shards.forEach((shard, index) => {
    const assignments = window.shards.get(shard.ep_rank)?.assignments ?? 0;
    const relative = total ? (assignments * shards.length) / total : NaN;
    const process = processes.get(`shard-${shard.ep_rank}`);
    const isBad = process !== undefined && process.state !== "ready";
    const health = process ? process.state : "unknown";
    const held = `${shard.num_units} units, ${bytes(shard.weight_bytes)}`;
    const note = isBad ? `${health} ${process.detail}` : `${held} · ${count(assignments)} computed`;
    fillRow(host.children[index], {
      colour: css(shardColour(shard.ep_rank)), part: relative / 2 || 0, value: times(relative), note, isBad,
      label: `shard ${shard.ep_rank}, ${health}: ${times(relative)} the mean load, ${count(shard.num_assignments)} computed in all, ${held}, at ${shard.address}`,
    });
  });
}

export function showWorkers(state) {
  const processes = (state.status?.processes ?? []).filter((process) => !process.name.startsWith("shard-"));
  const host = byId("workers");
  rows(host, processes.map((process) => process.name), false, () => {});
  processes.forEach((process, index) => {
    const worker = state.metrics.workers[process.name.slice("worker-".length)];
    const isBad = process.state !== "ready";
    host.children[index].classList.toggle("plain", !process.name.startsWith("worker-"));
    const usage = process.name.startsWith("worker-") ? worker?.cache_usage_ratio : undefined;
    const work = worker && usage !== undefined ? `${worker.num_running} running, ${worker.num_waiting} waiting · ` : "";
    fillRow(host.children[index], {
      colour: isBad ? "var(--bad)" : "var(--good)", part: usage ?? 0, value: usage === undefined ? "" : percent(usage),
      note: isBad ? `${process.state} ${process.detail}` : `${work}${process.address}`, isBad,
      label: `${process.name}, ${process.state}: ${work}${process.address}`,
    });
  });
}

export function describeCell(state, placement, layer, expert, tokens, relative) {
  const place = placement.layers[layer];
  const unit = place.expert_to_unit[expert];
  const others = place.expert_to_unit.flatMap((other, id) => (other === unit ? [id] : []));
  const processes = new Map((state.status?.processes ?? []).map((process) => [process.name, process.state]));
  const shards = place.unit_ep_ranks[unit].map((rank) => ({
    rank,
    address: state.load.shards.find((shard) => shard.ep_rank === rank)?.address ?? "",
    health: processes.get(`shard-${rank}`) ?? "unknown",
  }));
  return { layerId: place.layer_id, expert, unit, others, shards, tokens, relative };
}

export const cellText = (cell) =>
  `layer ${cell.layerId} · expert ${cell.expert}\n${count(cell.tokens)} tokens, ${times(cell.relative)} the layer's mean\nunit ${cell.unit} on shard ${cell.shards.map((shard) => shard.rank).join(", ")}`;

export function showCell(cell) {
  const list = document.createElement("dl");
  const add = (term, ...content) => {
    const pair = element("div");
    const value = document.createElement("dd");
    value.append(...content);
    pair.append(element("dt", "", term), value);
    list.append(pair);
  };
  add("Expert", `layer ${cell.layerId}, expert ${cell.expert}`);
  add("Tokens in the window", `${count(cell.tokens)} (${times(cell.relative)} the mean)`);
  add("Placement unit", `${cell.unit}: experts ${ranges(cell.others)}`);
  add(cell.shards.length > 1 ? `Lives on ${cell.shards.length} shards` : "Lives on", ...cell.shards.map((shard) => {
    const chip = element("span", "chip");
    const swatch = element("span", "swatch");
    swatch.style.background = css(shardColour(shard.rank));
    chip.append(swatch, `shard ${shard.rank} · ${shard.address} · ${shard.health}`);
    return chip;
  }));
  const host = byId("cell");
  const key = JSON.stringify(cell);
  if (host.dataset.key === key) return;
  host.dataset.key = key;
  host.replaceChildren(list);
}

function ranges(ids) {
  const parts = [];
  for (const id of ids) {
    const last = parts.at(-1);
    if (last && last[1] === id - 1) last[1] = id;
    else parts.push([id, id]);
  }
  return parts.map(([first, last]) => (first === last ? `${first}` : `${first}–${last}`)).join(", ");
}

export function showRebalance(status) {
  const rebalance = status?.rebalance;
  const isUnderWay = rebalance !== undefined && rebalance.state !== "idle";
  byId("rebalance").hidden = !isUnderWay;
  if (!isUnderWay) return;
  set("rebalance-text", `Rebalance to version ${rebalance.target_version}: ${rebalance.state}, ${bytes(rebalance.moved_bytes)} of ${bytes(rebalance.planned_bytes)} read`);
  byId("rebalance-bar").value = rebalance.planned_bytes ? rebalance.moved_bytes / rebalance.planned_bytes : 1;
}

export function showEvents(events) {
  const host = byId("events");
  if (!host.childElementCount) host.append(element("li", "nothing", "Nothing yet. Placements, rebalances with their reasons, and processes that come and go are written here."));
  if (!events.length) return;
  host.querySelector(".nothing")?.remove();
  for (const event of events) {
    const item = document.createElement("li");
    const mark = element("span", `mark ${event.level}`);
    mark.role = "img";
    mark.ariaLabel = event.level;
    item.append(element("time", "", clock(event.time_s)), mark, element("b", "", event.subject), element("span", "", event.text));
    host.prepend(item);
  }
  while (host.childElementCount > 300) host.lastChild.remove();
}
