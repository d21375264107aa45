// The figures above all others, each with its last minute as a line.

import { byId, count, element, seconds, setText } from "./dom.js";

const KEPT = 120; // values of a line: a minute
const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT] = [120, 28];

const TILES = [
  ["throughput", "Throughput", "tokens/s", (beat) => beat.tokens_per_s, count, ({ requests }) => requests],
  ["first", "First token", "", (_, figures) => figures?.first_token.p50, seconds, ({ figures }) => p95(figures?.first_token)],
  ["between", "Between tokens", "", (_, figures) => figures?.between_tokens.p50, seconds, ({ figures }) => p95(figures?.between_tokens)],
  ["rows", "Rows to experts", "rows/s", (_, figures) => sum(figures, "rows_per_s"), count, ({ figures }) => `${(sum(figures, "in_flight") ?? 0).toFixed(1)} in flight`],
  ["imbalance", "Imbalance", "", (beat) => beat.imbalance, (value) => value.toFixed(2), ({ copies }) => copies],
];

const p95 = (latency) => `median; p95 ${seconds(latency?.p95)}`;
const sum = (figures, name) => figures?.shards.reduce((total, shard) => total + shard[name], 0);

export class Tiles {
  constructor() {
    this.figures = null;
    this.copies = "";
    this.tiles = TILES.map(([name, label, unit, value, format, below]) => {
      const number = element("span", { class: "number" }, "–");
      const note = element("p", { class: "below" });
      const line = document.createElementNS(SVG, "path");
      const svg = document.createElementNS(SVG, "svg");
      svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
      svg.setAttribute("preserveAspectRatio", "none");
      svg.setAttribute("aria-hidden", "true");
      svg.append(line);
      const figure = element("p", { class: "figure" }, number, unit ? element("span", { class: "unit" }, ` ${unit}`) : "");
      const tile = element("li", { class: "tile", "data-tile": name }, element("h3", {}, label), figure, note, svg);
      byId("tiles").append(tile);
      return { tile, number, note, line, value, format, below, values: [] };
    });
  }

  /** picture: the cluster's. */
  cluster(picture) {
    const { num_copied: copied, num_experts: experts } = picture;
    for (const { tile } of this.tiles) tile.hidden = !experts && ["rows", "imbalance"].includes(tile.dataset.tile);
    this.copies = copied ? `${count(copied)} experts have copies` : "one copy of each expert";
  }

  beat(beat) {
    this.figures = beat.figures ?? this.figures;
    const waiting = beat.replicas.reduce((total, replica) => total + replica.waiting, 0);
    const running = beat.replicas.reduce((total, replica) => total + replica.running, 0);
    const requests = `${running} running, ${waiting} waiting`;
    const facts = { requests, figures: this.figures, copies: this.copies };
    for (const tile of this.tiles) {
      const value = tile.value(beat, this.figures);
      setText(tile.number, value == null ? "–" : tile.format(value));
      setText(tile.note, tile.below(facts));
      tile.values = [...tile.values, value ?? 0].slice(-KEPT);
      tile.line.setAttribute("d", path(tile.values));
    }
  }
}

function path(values) {
  const most = Math.max(...values) || 1;
  return values
    .map((value, place) => {
      const x = ((KEPT - values.length + place) * WIDTH) / (KEPT - 1);
      return `${place ? "L" : "M"}${x.toFixed(1)} ${(HEIGHT - 2 - (value / most) * (HEIGHT - 4)).toFixed(1)}`;
    })
    .join("");
}
