// Four lines of time, kept for as long as the page is open, at most a quarter of an hour. uPlot draws.
import { shortClock } from "./format.js";

const KEPT = 900; // seconds
const HEIGHT = 132;

export class Chart {
  #host; #keys; #series; #data; #plot = null; #format; #even;

  // series: [name, ...]; format: a value as text; even: draw a line at 1.
  constructor(name, series, format, { even = false } = {}) {
    this.#host = document.getElementById(`chart-${name}`);
    this.#keys = document.getElementById(`keys-${name}`);
    this.#series = series;
    this.#format = format;
    this.#even = even;
    this.#data = [[], ...series.map(() => [])];
    this.#keys.replaceChildren(...series.map((label) => {
      const key = document.createElement("span");
      key.append(`${label} `, document.createElement("em"));
      return key;
    }));
  }

  add(time_s, values) {
    this.#data[0].push(time_s);
    values.forEach((value, index) => this.#data[index + 1].push(Number.isFinite(value) ? value : null));
    if (this.#data[0].length > KEPT) for (const line of this.#data) line.shift();
    if (this.#plot) this.#plot.setData(this.#data);
    else this.build();
    this.#name(this.#data[0].length - 1);
  }

  build() {
    this.#plot?.destroy();
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = { stroke: colour("--muted"), font: "10px system-ui, 'DejaVu Sans', sans-serif", ticks: { show: false }, grid: { stroke: colour("--line"), width: 1 } };
    const options = {
      width: this.#host.clientWidth,
      height: HEIGHT,
      legend: { show: false },
      cursor: { sync: { key: "mobula" }, y: false, drag: { x: false, y: false }, points: { size: 6 } },
      hooks: {
        setCursor: [(plot) => this.#name(plot.cursor.idx ?? this.#data[0].length - 1)],
        draw: this.#even ? [(plot) => drawEven(plot, colour("--even"))] : [],
      },
      scales: {
        x: { range: (_, low, high) => [Math.min(low, high - 60), high] },
        y: { range: (_, low, high) => (this.#even ? [0.9, Math.max(1.5, (high ?? 1) * 1.08)] : [0, Math.max((high ?? 0) * 1.12, 1)]) },
      },
      axes: [
        { ...axis, size: 22, space: 70, grid: { show: false }, values: (_, ticks) => ticks.map(shortClock) },
        { ...axis, size: 40, space: 30, values: (_, ticks) => ticks.map((tick) => this.#format(tick)) },
      ],
      series: [{}, ...this.#series.map((label, index) => ({ label, stroke: colour(`--s${index + 1}`), width: 1.75, dash: index === 2 ? [6, 4] : undefined, points: { show: false }, spanGaps: false }))],
    };
    this.#plot = new uPlot(options, this.#data, this.#host);
  }

  resize() {
    if (this.#plot && this.#host.clientWidth) this.#plot.setSize({ width: this.#host.clientWidth, height: HEIGHT });
  }

  #name(index) {
    this.#series.forEach((_, number) => {
      const value = this.#data[number + 1][index];
      this.#keys.children[number].lastChild.textContent = value == null ? "–" : this.#format(value);
    });
    this.#host.ariaLabel = this.#keys.textContent;
  }
}

function drawEven(plot, colour) {
  const y = Math.round(plot.valToPos(1, "y", true)) + 0.5;
  plot.ctx.save();
  plot.ctx.strokeStyle = colour;
  plot.ctx.setLineDash([4, 4]);
  plot.ctx.beginPath();
  plot.ctx.moveTo(plot.bbox.left, y);
  plot.ctx.lineTo(plot.bbox.left + plot.bbox.width, y);
  plot.ctx.stroke();
  plot.ctx.restore();
}
