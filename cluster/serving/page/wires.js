// The ways of rows from attention replicas to expert shards, as lines between their cards; the cards say it in figures.

import { shardColour } from "./colour.js";
import { byId } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const MOST_LINES = 128;
const FULL_RATE = 2000; // rows/s at which a line is as wide as it gets

export class Wires {
  constructor() {
    this.svg = byId("wires");
    this.theme = "light";
    this.picture = null;
    this.rates = new Map(); // "replica/shard" -> rows/s
    this.lines = new Map();
    const resized = new ResizeObserver(() => this.place());
    for (const id of ["replicas", "shards"]) resized.observe(byId(id));
  }

  paint(theme) {
    this.theme = theme;
    this.place();
  }

  /** picture: the cluster's, whose cards are there already. */
  cluster(picture) {
    this.picture = picture;
    this.place();
  }

  beat(beat) {
    if (!beat.figures) return;
    this.rates = new Map(beat.figures.links.map((link) => [`${link.replica}/${link.shard}`, link.rows_per_s]));
    this.colour();
  }

  /** Lines are drawn where the cards of each kind stand in one row. */
  place() {
    if (!this.picture) return;
    const [replicas, shards] = ["replicas", "shards"].map((id) => [...byId(id).children]);
    const inRows = [replicas, shards].every((cards) => cards.length && cards.every((card) => card.offsetTop === cards[0].offsetTop));
    this.svg.toggleAttribute("hidden", !inRows || replicas.length * shards.length > MOST_LINES || shards.length < 2);
    if (this.svg.hasAttribute("hidden")) return;
    const { left, width, height } = this.svg.getBoundingClientRect();
    this.svg.setAttribute("viewBox", `0 0 ${Math.max(1, width)} ${height}`);
    const middle = (card) => card.getBoundingClientRect().left - left + card.offsetWidth / 2;
    const wanted = new Map();
    this.picture.replicas.forEach((replica, from) => {
      this.picture.shards.forEach((shard, to) => {
        const name = `${replica.slot < 0 ? replica.name : replica.slot}/${shard.id}`;
        const [start, end, half] = [middle(replicas[from]), middle(shards[to]), height / 2];
        wanted.set(name, { shard, path: `M${start} 0C${start} ${half} ${end} ${half} ${end} ${height}` });
      });
    });
    this.draw(wanted);
    this.colour();
  }

  draw(wanted) {
    for (const [name, { line }] of this.lines) if (!wanted.has(name)) line.remove();
    this.lines = new Map(
      [...wanted].map(([name, { shard, path }]) => {
        const line = this.lines.get(name)?.line ?? this.svg.appendChild(document.createElementNS(SVG, "path"));
        line.setAttribute("d", path);
        return [name, { line, shard }];
      }),
    );
  }

  colour() {
    for (const [name, { line, shard }] of this.lines) {
      const rate = shard.state === "up" ? (this.rates.get(name) ?? 0) : 0;
      line.style.stroke = rate ? shardColour(this.theme, shard.id) : "";
      line.style.strokeWidth = rate ? `${(1.5 + 3 * Math.min(1, Math.sqrt(rate / FULL_RATE))).toFixed(1)}px` : "";
      line.setAttribute("class", shard.state !== "up" ? "cut" : rate ? "flows" : "");
    }
  }
}
