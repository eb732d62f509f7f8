// What was counted when: counters only grow, so what happened in a window is the difference of two looks.

const FINE_S = 15; // looks of each second are kept for so long, then one in COARSE_S
const COARSE_S = 10;
const KEPT_S = 620;

export class History {
  #looks = [];

  // Forgets everything when counters went down: a shard began anew, and differences would mean nothing.
  add(state) {
    const look = lookOf(state);
    const last = this.#looks.at(-1);
    if (last && !follows(last, look)) this.#looks = [];
    this.#looks.push(look);
    this.#thin(look.time);
  }

  get latest() { return this.#looks.at(-1); }

  // What was counted in the last so many seconds ("all": since the processes started), or null before two looks.
  window(length) {
    const now = this.latest;
    if (!now) return null;
    if (length === "all") return difference(now, null);
    const base = this.#looks.findLast((look) => look.time <= now.time - length + 0.5) ?? this.#looks[0];
    return base === now ? null : difference(now, base);
  }

  #thin(now) {
    let kept = -Infinity;
    this.#looks = this.#looks.filter((look) => {
      if (look.time < now - KEPT_S) return false;
      if (look.time >= now - FINE_S) return true;
      if (look.time < kept + COARSE_S - 0.5) return false;
      kept = look.time;
      return true;
    });
  }
}

function lookOf(state) {
  const load = state.load;
  return {
    time: state.time_s,
    layers: load.num_tokens.length,
    experts: load.num_tokens[0]?.length ?? 0,
    tokens: Float64Array.from(load.num_tokens.flat()),
    shards: new Map(load.shards.map((shard) => [shard.ep_rank, shard])),
    ranks: load.dispatch.num_tokens_by_ranks,
    sent: load.dispatch.sent_bytes,
    received: load.dispatch.received_bytes,
    counters: state.metrics.counters,
    histograms: state.metrics.histograms,
  };
}

function follows(last, look) {
  if (last.layers !== look.layers || last.experts !== look.experts) return false;
  for (let index = 0; index < look.tokens.length; index++) if (look.tokens[index] < last.tokens[index]) return false;
  return Object.entries(look.counters).every(([name, value]) => value >= (last.counters[name] ?? 0));
}

function difference(now, base) {
  const tokens = base ? now.tokens.map((value, index) => value - base.tokens[index]) : now.tokens;
  const shards = new Map();
  for (const [rank, shard] of now.shards) {
    const before = base?.shards.get(rank);
    shards.set(rank, {
      assignments: shard.num_assignments - (before?.num_assignments ?? 0),
      rows: shard.num_rows - (before?.num_rows ?? 0),
    });
  }
  const counters = {};
  for (const [name, value] of Object.entries(now.counters)) counters[name] = value - (base?.counters[name] ?? 0);
  const histograms = {};
  for (const [name, { bounds, counts }] of Object.entries(now.histograms)) {
    const before = base?.histograms[name];
    histograms[name] = { bounds, counts: counts.map((value, index) => value - (before?.counts[index] ?? 0)) };
  }
  return {
    seconds: base ? now.time - base.time : null,
    layers: now.layers,
    experts: now.experts,
    tokens,
    shards,
    ranks: now.ranks.map((value, index) => value - (base?.ranks[index] ?? 0)),
    counters,
    histograms,
  };
}

// Linear within the bucket, as PromQL's histogram_quantile; NaN when nothing was observed.
export function quantile({ bounds, counts }, part) {
  const total = counts.at(-1) ?? 0;
  if (!total) return NaN;
  const wanted = part * total;
  const index = counts.findIndex((value) => value >= wanted);
  if (index >= bounds.length) return bounds.at(-1);
  const low = index ? bounds[index - 1] : 0;
  const below = index ? counts[index - 1] : 0;
  return low + (bounds[index] - low) * ((wanted - below) / (counts[index] - below || 1));
}

// f, f′ and f″ of DeepSeek-V2's balance losses as they show at run time: the highest over the mean, 1 is even.
export function balanceTerms(window) {
  let hottest = 0;
  let all = 0;
  for (let layer = 0; layer < window.layers; layer++) {
    let most = 0;
    for (let at = layer * window.experts; at < (layer + 1) * window.experts; at++) {
      all += window.tokens[at];
      if (window.tokens[at] > most) most = window.tokens[at];
    }
    hottest += most;
  }
  const shards = [...window.shards.values()];
  return {
    expert: all ? (hottest * window.experts) / all : NaN, // layers by their tokens: the last one has few
    shard: highestOverMean(shards.map((shard) => shard.assignments)),
    rows: highestOverMean(shards.map((shard) => shard.rows)),
  };
}

function highestOverMean(values) {
  const total = values.reduce((sum, value) => sum + value, 0);
  return total ? (Math.max(...values) * values.length) / total : NaN;
}
