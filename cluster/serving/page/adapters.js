// The LoRA adapters: who is loaded, the choice of one for the chat, and for administrators loading and unloading.

import { KeyedList, byId, element } from "./dom.js";

export class Adapters {
  /** admin: asks before a change (`confirm`) and makes it (`change`). */
  constructor(admin) {
    this.admin = admin;
    this.allowed = false;
    this.buttons = new Map();
    this.part = byId("adapters-part");
    this.choice = byId("adapter");
    this.list = new KeyedList(byId("adapters"), (name) => name, (name) => this.row(name));
    this.options = new KeyedList(this.choice, (name) => name, (name) => ({
      node: element("option", { value: name }, name || "none"),
      update: () => {},
    }));
    this.name = element("input", { required: true, maxlength: 128, autocomplete: "off", spellcheck: "false" });
    this.directory = element("input", { required: true, autocomplete: "off", spellcheck: "false", placeholder: "/adapters/law" });
    this.form = element(
      "form",
      { class: "loader" },
      element("label", {}, "Adapter ", this.name),
      element("label", {}, "Directory ", this.directory),
      element("button", {}, "Load adapter"),
    );
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.load(this.name.value.trim(), this.directory.value.trim());
    });
  }

  /** picture: the cluster's. One of an older version tells of no adapters. */
  cluster(picture) {
    const names = picture.adapters ?? [];
    for (const name of this.buttons.keys()) if (!names.includes(name)) this.buttons.delete(name);
    this.list.update(names);
    this.options.update(["", ...names]);
    this.part.hidden = byId("adapter-choice").hidden = names.length === 0;
  }

  /** Shows or hides what changes the cluster. */
  allow(allowed) {
    this.allowed = allowed;
    for (const button of this.buttons.values()) button.hidden = !allowed;
  }

  row(name) {
    const button = element("button", { type: "button", onclick: () => this.unload(name), "aria-label": `Unload ${name}` }, "Unload");
    button.hidden = !this.allowed;
    this.buttons.set(name, button);
    return { node: element("li", { class: "part part-head" }, element("span", {}, name), button), update: () => {} };
  }

  async load(name, directory) {
    const text = "All attention replicas read it, and the shards where it changes their experts. Requests name it as their model.";
    if (!(await this.admin.confirm(`Load the adapter ${name}?`, text, "Load"))) return;
    this.admin.change("v1/load_lora_adapter", { lora_name: name, lora_path: directory });
  }

  async unload(name) {
    const text = "Requests that run with it go on to their end.";
    if (!(await this.admin.confirm(`Unload the adapter ${name}?`, text, "Unload"))) return;
    this.admin.change("v1/unload_lora_adapter", { lora_name: name });
  }
}
