// Colours of the heat map. The ramps go in one direction of lightness, so they read the same with any colour vision.

const LIGHT = [[238, 242, 246], [190, 214, 232], [122, 176, 214], [62, 128, 188], [24, 78, 144], [13, 36, 82]];
const DARK = [[24, 33, 42], [26, 66, 104], [32, 106, 148], [66, 156, 178], [148, 208, 190], [252, 246, 200]];
// Okabe and Ito's, which people of any colour vision tell apart; more shards than these repeat hues of other lightness.
const SHARDS = [[0, 114, 178], [230, 159, 0], [0, 158, 115], [204, 121, 167], [213, 94, 0], [86, 180, 233], [146, 120, 40], [112, 92, 190]];
const STEPS = 256;

export const isDark = () => document.documentElement.hasAttribute("data-dark");

export function ramp() {
  const stops = isDark() ? DARK : LIGHT;
  const colours = new Uint32Array(STEPS);
  for (let step = 0; step < STEPS; step++) {
    const at = (step / (STEPS - 1)) * (stops.length - 1);
    const low = Math.min(stops.length - 2, Math.floor(at));
    colours[step] = mix(stops[low], stops[low + 1], at - low);
  }
  return colours;
}

export function shardColour(rank) {
  const [r, g, b] = SHARDS[rank % SHARDS.length];
  const lift = (Math.floor(rank / SHARDS.length) % 3) * 0.28;
  return [r, g, b].map((part) => Math.round(part + (255 - part) * lift));
}

// A ramp for each shard, from the surface to its colour: intensity still says load.
export function shardRamps(ranks) {
  const ground = (isDark() ? DARK : LIGHT)[0];
  return new Map(ranks.map((rank) => [rank, Uint32Array.from({ length: STEPS }, (_, step) => mix(ground, shardColour(rank), 0.12 + (0.88 * step) / (STEPS - 1)))]));
}

export const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;

function mix(low, high, part) {
  const [r, g, b] = low.map((value, index) => Math.round(value + (high[index] - value) * part));
  return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0; // as the bytes of ImageData lie
}
