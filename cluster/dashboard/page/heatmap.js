// Layers by experts on a canvas: one pixel a cell, enlarged without smoothing, so that 59 x 160 costs what 59 x 160 is.
import { isDark, ramp, shardRamps } from "./palette.js";

const MARGIN = { left: 30, top: 16 };
const MAX_ROW = 24;

export class HeatMap {
  #canvas; #context; #cells = document.createElement("canvas"); #image = null; #pixels = null;
  #shape = { layers: 0, experts: 0 }; #layerIds = []; #placement = null; #relative = null; #scale = 2;
  #ramp = ramp(); #shardRamps = new Map(); #byShard = false; #litShard = null;
  #size = { width: 0, height: 0 }; #style = {};
  cursor = null; // {layer, expert} that the pointer or the arrow keys are on
  kept = null; // the one that was clicked

  constructor(canvas) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d");
  }

  get scale() { return this.#scale; }
  get colours() { return this.#ramp; }

  colourBy(shard) { this.#byShard = shard; this.draw(); }
  light(rank) { this.#litShard = rank; this.draw(); }
  recolour() {
    const style = getComputedStyle(document.documentElement);
    this.#style = Object.fromEntries(["surface", "muted", "text", "s2"].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
    this.#ramp = ramp();
    this.#shardRamps = shardRamps(this.#ranks());
    this.draw();
  }

  place(placement) {
    this.#placement = placement;
    this.#shardRamps = shardRamps(this.#ranks());
  }

  #ranks() {
    return this.#placement ? Array.from({ length: this.#placement.ep_size }, (_, rank) => rank) : [];
  }

  // tokens: [layers * experts]; colours show each over the mean of its layer.
  show(window, layerIds) {
    const { layers, experts, tokens } = window;
    if (layers !== this.#shape.layers || experts !== this.#shape.experts) {
      this.#shape = { layers, experts };
      this.#cells.width = experts;
      this.#cells.height = layers;
      this.#image = new ImageData(experts, layers);
      this.#pixels = new Uint32Array(this.#image.data.buffer);
      this.#relative = new Float32Array(layers * experts);
      this.resize();
    }
    this.#layerIds = layerIds;
    let highest = 0;
    for (let layer = 0; layer < layers; layer++) {
      let total = 0;
      const first = layer * experts;
      for (let at = first; at < first + experts; at++) total += tokens[at];
      for (let at = first; at < first + experts; at++) {
        const value = total ? (tokens[at] * experts) / total : 0;
        this.#relative[at] = value;
        if (value > highest) highest = value;
      }
    }
    this.#scale = [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64].find((step) => highest <= step) ?? 128;
    this.draw();
  }

  relative(layer, expert) { return this.#relative?.[layer * this.#shape.experts + expert] ?? 0; }

  ranksOf(layer, expert) {
    const place = this.#placement?.layers[layer];
    return place ? place.unit_ep_ranks[place.expert_to_unit[expert]] : [];
  }

  // Also where `resize` observers call: the canvas has as many pixels as the screen.
  resize() {
    const width = this.#canvas.clientWidth;
    const { layers, experts } = this.#shape;
    if (!layers || !width) return;
    const cell = (width - MARGIN.left) / experts;
    const row = Math.max(cell < 4 ? 4 : 6, Math.min(MAX_ROW, cell * (layers > 30 ? 1.7 : 1)));
    const height = Math.round(MARGIN.top + row * layers);
    this.#size = { width, height }; // asking the canvas at each draw would lay the page out each time
    const dots = window.devicePixelRatio || 1;
    this.#canvas.style.height = `${height}px`;
    this.#canvas.width = Math.round(width * dots);
    this.#canvas.height = Math.round(height * dots);
    this.#context.setTransform(dots, 0, 0, dots, 0, 0);
    this.draw();
  }

  #box() {
    const { layers, experts } = this.#shape;
    const width = this.#size.width - MARGIN.left;
    const height = this.#size.height - MARGIN.top;
    return { width, height, cell: width / experts, row: height / layers };
  }

  at(x, y) {
    const { cell, row } = this.#box();
    const expert = Math.floor((x - MARGIN.left) / cell);
    const layer = Math.floor((y - MARGIN.top) / row);
    const { layers, experts } = this.#shape;
    return layer >= 0 && layer < layers && expert >= 0 && expert < experts ? { layer, expert } : null;
  }

  positionOf({ layer, expert }) {
    const { cell, row } = this.#box();
    return { x: MARGIN.left + (expert + 0.5) * cell, y: MARGIN.top + (layer + 1) * row };
  }

  move(right, down) {
    const { layers, experts } = this.#shape;
    const from = this.cursor ?? this.kept ?? { layer: 0, expert: -1 };
    const within = (value, count) => Math.max(0, Math.min(count - 1, value));
    this.cursor = { layer: within(from.layer + down, layers), expert: within(from.expert + right, experts) };
    this.draw();
  }

  draw() {
    if (!this.#relative) return;
    const { layers, experts } = this.#shape;
    this.#paint();
    const box = this.#box();
    const context = this.#context;
    context.clearRect(0, 0, this.#size.width, this.#size.height);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.#cells, MARGIN.left, MARGIN.top, box.width, box.height);
    context.fillStyle = this.#style.surface;
    const x = (expert) => MARGIN.left + expert * box.cell;
    const y = (layer) => MARGIN.top + layer * box.row;
    if (box.cell >= 7) for (let expert = 1; expert < experts; expert++) context.fillRect(x(expert) - 0.5, MARGIN.top, 1, box.height);
    if (box.row >= 7) for (let layer = 1; layer < layers; layer++) context.fillRect(MARGIN.left, y(layer) - 0.5, box.width, 1);
    for (const expert of this.#unitBounds()) context.fillRect(x(expert) - 1, MARGIN.top, 2, box.height);
    this.#labels(context, this.#style.muted, x, y, box);
    if (this.kept) this.#frame(context, this.kept, this.#style.s2, x, y, box);
    if (this.cursor) this.#frame(context, this.cursor, this.#style.text, x, y, box);
  }

  #paint() {
    const { experts } = this.#shape;
    const faint = (isDark() ? 0x60000000 : 0x48000000) >>> 0;
    const last = 255;
    for (let at = 0; at < this.#pixels.length; at++) {
      const step = Math.min(last, Math.round(Math.sqrt(this.#relative[at] / this.#scale) * last));
      let colours = this.#ramp;
      if (this.#byShard || this.#litShard !== null) {
        const ranks = this.ranksOf(Math.floor(at / experts), at % experts);
        if (this.#byShard) colours = this.#shardRamps.get(ranks[0]) ?? this.#ramp;
        if (this.#litShard !== null && !ranks.includes(this.#litShard)) {
          this.#pixels[at] = ((colours[step] & 0x00ffffff) | faint) >>> 0;
          continue;
        }
      }
      this.#pixels[at] = colours[step];
    }
    this.#cells.getContext("2d").putImageData(this.#image, 0, 0);
  }

  // Where units end, if they do alike in every layer.
  #unitBounds() {
    const layers = this.#placement?.layers ?? [];
    if (!layers.length) return [];
    const bounds = layers[0].expert_to_unit.flatMap((unit, expert, units) => (expert && unit !== units[expert - 1] ? [expert] : []));
    return bounds.length < layers[0].unit_ep_ranks.length ? bounds : [];
  }

  #labels(context, colour, x, y, box) {
    const { layers, experts } = this.#shape;
    context.fillStyle = colour;
    context.font = "10px system-ui, 'DejaVu Sans', sans-serif";
    context.textAlign = "right";
    context.textBaseline = "middle";
    const everyLayer = Math.max(1, Math.ceil(14 / box.row));
    for (let layer = 0; layer < layers; layer += everyLayer) context.fillText(this.#layerIds[layer], MARGIN.left - 6, y(layer + 0.5));
    context.textAlign = "center";
    const every = [1, 2, 4, 5, 8, 10, 16, 20, 32, 40, 64].find((step) => step * box.cell >= 24) ?? 64;
    for (let expert = 0; expert < experts; expert += every) context.fillText(expert, x(expert + 0.5), 7);
  }

  #frame(context, { layer, expert }, colour, x, y, box) {
    context.strokeStyle = colour;
    context.lineWidth = 2;
    context.strokeRect(x(expert) - 1, y(layer) - 1, box.cell + 2, box.row + 2);
  }
}
