// Numbers as people read them. Pure.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const count = (value) => whole.format(value);

export function short(value) {
  if (!Number.isFinite(value)) return "–";
  if (value >= 1e9) return `${(value / 1e9).toFixed(1)} G`;
  if (value >= 1e6) return `${(value / 1e6).toFixed(1)} M`;
  if (value >= 1e4) return `${(value / 1e3).toFixed(1)} k`;
  return value >= 100 || Number.isInteger(value) ? whole.format(value) : value.toFixed(1);
}

export const times = (value) => (Number.isFinite(value) ? `${value.toFixed(2)}×` : "–");
export const percent = (value) => (Number.isFinite(value) ? `${(100 * value).toFixed(value < 0.1 ? 1 : 0)}%` : "–");

export function seconds(value) {
  if (!Number.isFinite(value)) return "–";
  if (value < 0.1) return `${(1e3 * value).toFixed(value < 0.01 ? 1 : 0)} ms`;
  return value < 1 ? `${(1e3 * value).toFixed(0)} ms` : `${value.toFixed(1)} s`;
}

export function bytes(value) {
  if (value >= 2 ** 30) return `${(value / 2 ** 30).toFixed(1)} GiB`;
  return value >= 2 ** 20 ? `${(value / 2 ** 20).toFixed(1)} MiB` : `${(value / 2 ** 10).toFixed(0)} KiB`;
}

const toSecond = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const toMinute = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });

export const clock = (time_s) => toSecond.format(time_s * 1e3);
export const shortClock = (time_s) => (time_s % 60 ? clock(time_s) : toMinute.format(time_s * 1e3));
