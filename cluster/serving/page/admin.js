// Changes of the cluster, for those with an admin key: kill a shard, rebalance, scale, adapters. Each asks before it acts.

import { Adapters } from "./adapters.js";
import { announce, byId, element, setText } from "./dom.js";

export class Admin {
  constructor(api, { openKey }) {
    this.api = api;
    this.allowed = false;
    this.kills = new Map();
    this.result = element("p", { class: "admin-result", id: "admin-result" });
    this.give = element("button", { type: "button", onclick: openKey }, "Give a key");
    this.scales = [
      this.scale("expert_shards", "Expert shards", (picture) => picture.target_shards),
      this.scale("attention_replicas", "Attention replicas", (picture) => picture.replicas.length),
    ];
    this.rebalancing = element("button", { type: "button", onclick: () => this.rebalance() }, "Rebalance");
    this.adapters = new Adapters(this);
    byId("admin-actions").append(this.rebalancing, ...this.scales.map((scale) => scale.form), this.adapters.form);
    byId("admin").append(this.give, this.result);
  }

  /** Asks the server what this key allows. */
  async refresh() {
    let rights = { configured: false, allowed: false, name: "" };
    try {
      rights = await (await this.api.call("cluster/rights")).json();
    } catch (error) {
      if (error.status !== 401) return;
      rights.configured = true; // perhaps: a key tells
    }
    this.allowed = rights.allowed;
    byId("admin-actions").hidden = !rights.allowed;
    this.give.hidden = rights.allowed || !rights.configured;
    for (const kill of this.kills.values()) kill.hidden = !rights.allowed;
    this.adapters.allow(rights.allowed);
    setText(byId("admin-text"), words(rights));
  }

  /** picture: the cluster's. */
  cluster(picture) {
    const ids = new Set(picture.shards.map((shard) => shard.id));
    for (const [id, kill] of this.kills) {
      if (!ids.has(id)) this.kills.delete(id);
      else kill.disabled = picture.shards.find((shard) => shard.id === id).state !== "up";
    }
    const dense = picture.num_experts === 0;
    this.scales[0].form.hidden = this.rebalancing.hidden = dense;
    for (const scale of this.scales) scale.show(picture);
    this.adapters.cluster(picture);
  }

  /** The button that kills a shard, seen by administrators. */
  killButton(id) {
    const button = element("button", { type: "button", onclick: () => this.kill(id), "aria-label": `Kill shard ${id}` }, "Kill");
    button.hidden = !this.allowed;
    this.kills.set(id, button);
    return button;
  }

  async kill(id) {
    const text = "Its process ends at once, in the middle of its work. Other copies of its experts compute its rows; without a copy, requests wait until its successor is up.";
    if (await this.confirm(`Kill shard ${id}?`, text, "Kill")) this.change("cluster/kill-shard", { shard_id: id });
  }

  async rebalance() {
    const text = "Experts move to where the measured load asks for, while requests go on.";
    if (await this.confirm("Rebalance?", text, "Rebalance")) this.change("cluster/rebalance", {});
  }

  scale(field, label, countOf) {
    const input = element("input", { type: "number", min: 1, max: 4096, step: 1, required: true });
    const form = element("form", { class: "stepper" }, element("label", {}, `${label} `, input), element("button", { "aria-label": `Scale: ${label.toLowerCase()}` }, "Scale"));
    let known = null;
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const number = input.valueAsNumber;
      if (await this.confirm(`${label}: ${known} → ${number}?`, "Processes start or end one at a time, while requests go on.", "Scale")) {
        this.change("cluster/scale", { [field]: number });
      }
    });
    const show = (picture) => {
      const now = countOf(picture);
      if (now === known) return;
      known = now;
      if (document.activeElement !== input) input.value = now;
    };
    return { form, show };
  }

  async change(path, body) {
    this.tell("Asked for.", "");
    try {
      const { text } = await (await this.api.call(path, { body })).json();
      this.tell(`${text[0].toUpperCase()}${text.slice(1)}.`, "");
    } catch (error) {
      this.tell(error.message, "bad");
      if (error.status === 403 || error.status === 401) this.refresh();
    }
  }

  tell(text, kind) {
    this.result.dataset.kind = kind;
    setText(this.result, text);
    announce(text);
  }

  confirm(title, text, action) {
    const dialog = byId("confirm");
    setText(byId("confirm-title"), title);
    setText(byId("confirm-text"), text);
    setText(byId("confirm-yes"), action);
    dialog.returnValue = "no";
    dialog.showModal();
    return new Promise((resolve) => {
      dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
    });
  }
}

function words({ configured, allowed, name }) {
  if (allowed) return `You may change this cluster, as ${name}.`;
  if (configured) return "Read-only. With an admin key you can kill a shard, rebalance, scale and load adapters from here.";
  return "Read-only: this server has no admin keys (--admin-keys-file).";
}
