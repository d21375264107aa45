// Makes and finds elements. Text is only ever set as text: nothing here, or anywhere, reads HTML.

export const byId = (id) => document.getElementById(id);

/** An element with attributes; a function among them, as `onclick`, becomes a listener. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** Sets the text of an element if it is another one: an unchanged node disturbs no screen reader and no selection. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Keeps one child of a list for each item, by its key, in their order. `make(item)` returns {node, update}. */
export class KeyedList {
  constructor(list, keyOf, make) {
    this.list = list;
    this.keyOf = keyOf;
    this.make = make;
    this.rows = new Map();
  }

  update(items) {
    const keys = new Set(items.map(this.keyOf));
    for (const [key, row] of this.rows) {
      if (!keys.has(key)) {
        row.node.remove();
        this.rows.delete(key);
      }
    }
    items.forEach((item, place) => {
      const key = this.keyOf(item);
      if (!this.rows.has(key)) this.rows.set(key, this.make(item));
      const row = this.rows.get(key);
      if (this.list.children[place] !== row.node) this.list.insertBefore(row.node, this.list.children[place] ?? null);
      row.update(item);
    });
  }
}

/** Says something to a screen reader. */
export function announce(text) {
  setText(byId("announce"), text);
}

export function count(number) {
  if (number >= 10000) return `${(number / 1000).toFixed(0)}k`;
  if (number >= 1000) return `${(number / 1000).toFixed(1)}k`;
  return number >= 100 || Number.isInteger(number) ? number.toFixed(0) : number.toFixed(1);
}

export function bytes(number) {
  const units = ["B", "KB", "MB", "GB", "TB"];
  let unit = 0;
  while (number >= 1000 && unit < units.length - 1) {
    number /= 1000;
    unit += 1;
  }
  return `${number >= 100 || unit === 0 ? number.toFixed(0) : number.toFixed(1)} ${units[unit]}`;
}

export function seconds(value) {
  if (value == null) return "–";
  if (value < 0.001) return "<1 ms";
  return value < 1 ? `${(value * 1000).toFixed(0)} ms` : `${value.toFixed(value < 10 ? 2 : 1)} s`;
}
