// Draws the load of layers x experts on a canvas, and says it in words. Each cell is one expert.

import { byId, count, element, setText } from "./dom.js";
import { ramp, shardColour } from "./colour.js";
import { Load } from "./load.js";

const LABEL_PX = 26; // for the layers' numbers, left
const AXIS_PX = 18; // for the experts' numbers, below
const WORDS_MS = 2000; // between two changes of the words
const FRAME_S = 1 / 30; // at least, between two drawings of fading light
const ROUND_PX = 7; // from here on corners are seen

export class Heatmap {
  /** now: seconds of a steady clock. */
  constructor(now = () => performance.now() / 1000) {
    this.now = now;
    this.load = new Load();
    this.canvas = byId("heat");
    this.context = this.canvas.getContext("2d");
    this.up = new Set();
    this.marked = null; // the shard whose cells are outlined
    this.looked = null; // the cell that is looked at
    this.mode = "now";
    this.still = matchMedia("(prefers-reduced-motion: reduce)");
    this.wordsAt = 0;
    this.frame = 0;
    new ResizeObserver(() => this.measure()).observe(this.canvas.parentElement);
    for (const radio of document.querySelectorAll("input[name=mode]")) {
      radio.addEventListener("change", () => this.show(radio.value));
    }
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.leave());
    byId("look-layer").addEventListener("change", () => this.look());
    byId("look-expert").addEventListener("input", () => this.look());
    byId("as-table").addEventListener("toggle", () => this.table());
  }

  paint(theme) {
    this.theme = theme;
    this.colours = ramp(theme);
    const scale = byId("scale").getContext("2d");
    const { width, height } = byId("scale");
    this.colours.forEach((colour, step) => {
      scale.fillStyle = colour;
      scale.fillRect((step * width) / this.colours.length, 0, Math.ceil(width / this.colours.length), height);
    });
    this.draw();
  }

  show(mode) {
    this.mode = mode;
    byId("legend").dataset.mode = mode;
    this.draw();
  }

  placement(placement) {
    this.load.take(placement);
    const layers = byId("look-layer");
    if (layers.options.length !== this.load.rows) {
      layers.replaceChildren(...(placement?.layer_ids ?? []).map((id, row) => element("option", { value: row }, String(id))));
    }
    byId("experts").dataset.dense = String(!this.load.rows);
    byId("look-expert").max = Math.max(0, this.load.columns - 1);
    this.measure();
    this.words(true);
  }

  /** shards: of a cluster's picture. */
  shards(shards) {
    this.up = new Set(shards.filter((shard) => shard.state === "up").map((shard) => shard.id));
    this.draw();
  }

  mark(shard) {
    this.marked = shard;
    this.draw();
  }

  beat(beat) {
    this.load.beat(beat.tokens, beat.seconds, this.now());
    this.canvas.dataset.lit = String(Math.round((Number(this.canvas.dataset.lit) || 0) + lit(beat.tokens)));
    this.words(false);
    this.animate();
  }

  animate() {
    if (this.still.matches) this.draw(); // no fading between two beats
    if (this.frame || this.still.matches) return;
    const step = () => {
      this.frame = 0;
      const due = this.now() - this.load.litAt >= FRAME_S;
      const left = due ? this.load.fade(this.now()) : true;
      if (due) this.draw();
      if (left && !document.hidden) this.frame = requestAnimationFrame(step);
    };
    this.frame = requestAnimationFrame(step);
  }

  measure() {
    const width = this.canvas.parentElement.clientWidth;
    const { rows, columns } = this.load;
    if (!rows || !width) return;
    this.cell = (width - LABEL_PX) / columns;
    this.row = Math.max(6, Math.min(30, rows <= 6 ? 30 : this.cell * 1.15, 460 / rows));
    const height = Math.ceil(this.row * rows + AXIS_PX);
    const dots = devicePixelRatio || 1;
    this.canvas.width = Math.round(width * dots);
    this.canvas.height = Math.round(height * dots);
    this.canvas.style.height = `${height}px`;
    this.context.setTransform(dots, 0, 0, dots, 0, 0);
    this.draw();
  }

  draw() {
    const { rows, columns } = this.load;
    if (!rows || !this.cell || !this.colours) return;
    const { context } = this;
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.style = getComputedStyle(this.canvas);
    this.most = this.mode === "mean" ? this.load.mean.reduce((most, mean) => Math.max(most, mean), 0.1) : this.load.peak;
    for (let row = 0; row < rows; row += 1) {
      for (let column = 0; column < columns; column += 1) this.drawCell(row, column);
    }
    this.drawAxes();
    setText(byId("scale-max"), `${count(this.most)} tokens/s`);
  }

  drawCell(row, column) {
    const { context, load } = this;
    const gap = this.cell > 7 ? 1.5 : this.cell > 4 ? 1 : 0.5;
    const [x, y] = [LABEL_PX + column * this.cell, row * this.row];
    const [width, height] = [this.cell - gap, this.row - gap];
    const owners = load.owners(row, column);
    const value = (this.mode === "mean" ? load.mean : load.light)[row * load.columns + column];
    const share = Math.min(1, value / this.most);
    context.fillStyle = this.mode === "shards"
      ? shardColour(this.theme, owners[0] ?? 0, 0.25 + 0.75 * share)
      : this.colours[value > 0 ? Math.max(5, Math.round(share * (this.colours.length - 1))) : 0];
    if (width < ROUND_PX) context.fillRect(x, y, width, height);
    else {
      context.beginPath();
      context.roundRect(x, y, width, height, Math.min(3, width / 4));
      context.fill();
    }
    const ink = this.style.color;
    if (owners.length > 1) this.dot(x + width - 2.5, y + 2.5, Math.min(1.6, width / 4), ink);
    if (!owners.some((shard) => this.up.has(shard))) this.cross(x, y, width, height);
    if (this.marked !== null && owners.includes(this.marked)) this.outline(x, y, width, height, 1);
    if (this.looked?.[0] === row && this.looked[1] === column) this.outline(x, y, width, height, 2);
  }

  dot(x, y, radius, colour) {
    this.context.fillStyle = colour;
    this.context.beginPath();
    this.context.arc(x, y, radius, 0, 2 * Math.PI);
    this.context.fill();
  }

  cross(x, y, width, height) {
    this.context.strokeStyle = this.style.caretColor;
    this.context.lineWidth = 1.2;
    this.context.beginPath();
    this.context.moveTo(x + 1, y + height - 1);
    this.context.lineTo(x + width - 1, y + 1);
    this.context.stroke();
  }

  outline(x, y, width, height, weight) {
    this.context.strokeStyle = this.style.color;
    this.context.lineWidth = weight;
    this.context.strokeRect(x + weight / 2, y + weight / 2, width - weight, height - weight);
  }

  drawAxes() {
    const { context, load } = this;
    context.fillStyle = this.style.color;
    context.font = `11px ${this.style.fontFamily}`;
    context.textBaseline = "middle";
    context.textAlign = "right";
    const every = Math.ceil(12 / this.row);
    load.placement.layer_ids.forEach((id, row) => {
      if (row % every === 0) context.fillText(String(id), LABEL_PX - 7, (row + 0.5) * this.row);
    });
    context.textAlign = "center";
    const step = [1, 2, 4, 8, 16, 32, 64].find((each) => each * this.cell >= 26) ?? 128;
    for (let column = 0; column < load.columns; column += step) {
      context.fillText(String(column), LABEL_PX + (column + 0.5) * this.cell, load.rows * this.row + 10);
    }
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - LABEL_PX) / this.cell);
    const row = Math.floor((event.clientY - box.top) / this.row);
    if (column < 0 || column >= this.load.columns || row < 0 || row >= this.load.rows) return this.leave();
    byId("look-layer").value = row;
    byId("look-expert").value = column;
    this.look();
    const tip = byId("tip");
    setText(tip, byId("look-out").textContent);
    tip.hidden = false;
    const left = Math.min(event.clientX - box.left + 12, box.width - tip.offsetWidth);
    tip.style.transform = `translate(${Math.max(0, left)}px, ${event.clientY - box.top + 16}px)`;
    return undefined;
  }

  leave() {
    byId("tip").hidden = true;
  }

  look() {
    const [row, column] = [Number(byId("look-layer").value), byId("look-expert").valueAsNumber];
    const inside = column >= 0 && column < this.load.columns && row < this.load.rows;
    this.looked = inside ? [row, column] : null;
    setText(byId("look-out"), inside ? this.describe(row, column) : "");
    this.draw();
  }

  describe(row, column) {
    const shards = this.load.owners(row, column);
    const where = `on ${shards.length > 1 ? "shards" : "shard"} ${shards.join(" and ")}`;
    const rate = this.load.mean[row * this.load.columns + column];
    const lost = shards.some((shard) => this.up.has(shard)) ? "" : ", which is not up";
    return `layer ${this.load.placement.layer_ids[row]}, expert ${column}: ${rate.toFixed(1)} tokens/s, ${where}${lost}`;
  }

  words(atOnce) {
    const now = this.now() * 1000;
    if (!atOnce && now - this.wordsAt < WORDS_MS) return;
    this.wordsAt = now;
    setText(byId("heat-summary"), this.summary());
    if (this.looked) setText(byId("look-out"), this.describe(...this.looked));
    this.table();
  }

  summary() {
    if (!this.load.rows) return "This model is dense: it has no experts.";
    const layers = this.load.placement.layer_ids.map((id, row) => [id, this.load.layer(row, 2)]);
    if (!layers.some(([, layer]) => layer.total > 0.05)) return "No token has passed in the last minute.";
    const shown = layers.length > 4 ? [layers[0], layers.at(-1)] : layers;
    const parts = shown.map(([id, { busiest }]) => `layer ${id}: ${busiest.map((one) => `expert ${one.expert} (${percent(one.share)})`).join(", ")}`);
    return `Busiest in the last minute, by share of their layer's tokens: ${parts.join("; ")}.`;
  }

  table() {
    if (!byId("as-table").open || !this.load.rows) return;
    const rows = this.load.placement.layer_ids.map((id, row) => {
      const { total, used, busiest, copied } = this.load.layer(row);
      const names = busiest.map((one) => `${one.expert} (${percent(one.share)})`).join(", ") || "none";
      const cells = [count(total), names, `${used} of ${this.load.columns}`, String(copied)];
      return element("tr", {}, element("th", { scope: "row" }, String(id)), ...cells.map((text) => element("td", {}, text)));
    });
    byId("table-rows").replaceChildren(...rows);
  }
}

const percent = (share) => `${(100 * share).toFixed(0)} %`;

function lit(tokens) {
  return tokens ? tokens.reduce((sum, row) => sum + row.filter((value) => value > 0).length, 0) : 0;
}
