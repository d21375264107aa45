// Attention replicas and expert shards as they are, a card for each.

import { KeyedList, byId, bytes, count, element, setText } from "./dom.js";
import { shardColour } from "./colour.js";

const meterOf = (label) => element("meter", { min: 0, max: 1, "aria-label": label });

function card(kind, title) {
  const name = element("h4", {}, title);
  const state = element("span", { class: "pill" });
  const facts = element("p", { class: "facts" });
  const load = element("dl", { class: "load" });
  const head = element("div", { class: "part-head" }, name, state);
  const node = element("li", { class: `part ${kind}` }, head, facts);
  return { node, name, state, facts, load, head };
}

/** A list of labels and values; `show` takes the values. */
function values(list, labels) {
  const shown = labels.map((label) => {
    const value = element("dd", {}, "–");
    list.append(element("div", {}, element("dt", {}, label), value));
    return value;
  });
  return (texts) => shown.forEach((value, place) => setText(value, texts[place] ?? "–"));
}

function showState(pill, state, kind) {
  setText(pill, state);
  pill.dataset.kind = kind;
}

const stateKind = (state, back) => state === "lost" ? "bad" : state === "up" && !back ? "good" : "busy";
const place = (process) => process
  ? [`node ${process.node}`, `pid ${process.pid}`, ...(process.gpus.length ? [`GPU ${process.gpus.join(", ")}`] : [])]
  : [];
const loaded = (part) => part.total_bytes ? ` ${Math.round((100 * part.loaded_bytes) / part.total_bytes)} %` : "";

// A shard may be back before anyone saw it go: for so long its card says that it has just come back.
const BACK_MS = 5000;

export class Processes {
  /** onMark: told the shard that is pointed at, or null.  shardAction: makes the button of a shard. */
  constructor({ onMark, shardAction }) {
    this.theme = "light";
    this.beats = { shards: new Map(), replicas: new Map() };
    this.figures = new Map();
    this.replicas = new KeyedList(byId("replicas"), (replica) => replica.name, (replica) => this.replica(replica));
    this.shards = new KeyedList(byId("shards"), (shard) => shard.id, (shard) => this.shard(shard, onMark, shardAction));
    this.picture = null;
  }

  paint(theme) {
    this.theme = theme;
    this.update();
  }

  cluster(picture) {
    this.picture = picture;
    this.update();
    const more = picture.versions.length > 1 ? `versions ${picture.versions.join(", ")}` : "";
    setText(byId("work"), picture.work || more);
    const wanted = picture.target_shards !== picture.shards.length ? `, ${picture.target_shards} wanted` : "";
    setText(byId("shards-title"), `Expert shards (${picture.shards.length}${wanted})`);
    setText(byId("replicas-title"), `Attention replicas (${picture.replicas.length})`);
  }

  beat(beat) {
    this.beats.shards = new Map(beat.shards.map((shard) => [shard.id, shard]));
    this.beats.replicas = new Map(beat.replicas.map((replica) => [replica.name, replica]));
    if (beat.figures) this.figures = new Map(beat.figures.shards.map((shard) => [shard.id, shard]));
    this.update();
  }

  update() {
    if (!this.picture) return;
    this.replicas.update(this.picture.replicas);
    this.shards.update(this.picture.shards);
  }

  replica(replica) {
    const { node, name, state, facts, load } = card("replica", "");
    const meter = meterOf(`KV cache in use, attention replica ${replica.slot}`);
    const show = values(load, ["tokens/s", "running", "waiting", "KV cache"]);
    node.append(load, meter);
    const update = (now) => {
      const beat = this.beats.replicas.get(now.name);
      setText(name, `Replica ${now.slot < 0 ? now.name : now.slot}`);
      showState(state, now.ready ? "up" : `loading${loaded(now)}`, now.ready ? "good" : "busy");
      const held = beat?.held ? ` (${beat.held} held)` : "";
      const cache = beat?.cache_tokens ? [`${count(beat.cache_tokens)}-token cache`] : [];
      const plan = now.ready && now.epoch < this.picture.epoch ? [`still at plan ${now.epoch}`] : [];
      setText(facts, [...cache, ...place(now.process), ...plan].join(" · "));
      show(beat ? [count(beat.tokens_per_s), `${beat.running}${held}`, String(beat.waiting), percent(beat.used)] : []);
      meter.value = beat?.used ?? 0;
    };
    return { node, update };
  }

  shard(shard, onMark, shardAction) {
    const { node, name, state, facts, load, head } = card("shard", "");
    const swatch = element("span", { class: "shard-colour", "aria-hidden": "true" });
    name.before(swatch);
    const meter = meterOf(`Share of the load, shard ${shard.id}`);
    const show = values(load, ["of the load", "rows/s", "in flight", "busy"]);
    node.append(load, meter);
    head.append(shardAction(shard.id));
    node.addEventListener("pointerenter", () => onMark(shard.id));
    node.addEventListener("pointerleave", () => onMark(null));
    node.addEventListener("focusin", () => onMark(shard.id));
    node.addEventListener("focusout", () => onMark(null));
    let { respawns } = shard;
    let backUntil = 0;
    const update = (now) => {
      if (now.respawns > respawns) backUntil = performance.now() + BACK_MS;
      respawns = now.respawns;
      const beat = this.beats.shards.get(now.id);
      const figures = this.figures.get(now.id);
      const up = now.state === "up";
      swatch.style.background = shardColour(this.theme, now.id);
      setText(name, `Shard ${now.id}`);
      const back = up && performance.now() < backUntil;
      showState(state, back ? "back" : now.state + (up ? "" : loaded(now)), stateKind(now.state, back));
      const memory = figures ? [bytes(figures.bytes)] : [];
      const again = now.respawns ? [`respawned ${now.respawns} ${now.respawns === 1 ? "time" : "times"}`] : [];
      setText(facts, [`${now.num_experts} experts`, ...memory, ...place(now.process), ...again].join(" · "));
      const share = up ? (beat?.share ?? 0) : 0;
      const traffic = figures && up ? [count(figures.rows_per_s), figures.in_flight.toFixed(1), percent(figures.busy)] : [];
      show([percent(share), ...traffic]);
      meter.value = share;
    };
    return { node, update };
  }
}

const percent = (share) => `${(100 * share).toFixed(0)} %`;
