// Faults, moves and parts that come and go, newest first.

import { KeyedList, announce, byId, element, setText } from "./dom.js";

const SHOWN = 14;
const KINDS = { fault: "Fault", move: "Move", up: "Up", change: "Change" };

export class Happenings {
  constructor() {
    this.last = null;
    this.list = new KeyedList(byId("events"), (event) => `${event.at}/${event.text}`, (event) => make(event));
  }

  /** events: oldest first. New faults are said to screen readers. */
  show(events) {
    const newest = events.at(-1)?.at ?? 0;
    if (this.last !== null) {
      const fresh = events.filter((event) => event.at > this.last && event.kind !== "move");
      if (fresh.length) announce(fresh.map((event) => event.text).join(". "));
    }
    this.last = newest;
    this.list.update(events.slice(-SHOWN).reverse());
    byId("events").dataset.empty = events.length ? "" : "Nothing yet.";
  }
}

function make(event) {
  const at = new Date(event.at * 1000);
  const time = element("time", { datetime: at.toISOString() }, at.toLocaleTimeString([], { hour12: false }));
  const kind = element("span", { class: "pill", "data-kind": { fault: "bad", up: "good", move: "busy" }[event.kind] ?? "" }, KINDS[event.kind] ?? event.kind);
  const text = element("span", { class: "what" });
  setText(text, event.text);
  return { node: element("li", {}, time, kind, text), update: () => {} };
}
