// Light, dark, or as the system has it.

import { byId, setText } from "./dom.js";
import { keep, kept } from "./storage.js";

const CHOICES = ["system", "light", "dark"];
const STORED = "moe-cluster-theme";

export class Theme {
  /** onPaint: told "light" or "dark", now and at each change. */
  constructor(onPaint) {
    this.onPaint = onPaint;
    this.system = matchMedia("(prefers-color-scheme: dark)");
    const choice = kept("localStorage", STORED);
    this.choice = CHOICES.includes(choice) ? choice : "system";
    this.system.addEventListener("change", () => this.paint());
    byId("theme").addEventListener("click", () => {
      this.choice = CHOICES[(CHOICES.indexOf(this.choice) + 1) % CHOICES.length];
      keep("localStorage", STORED, this.choice);
      this.paint();
    });
    this.paint();
  }

  paint() {
    const theme = this.choice === "system" ? (this.system.matches ? "dark" : "light") : this.choice;
    document.documentElement.dataset.theme = this.choice;
    setText(byId("theme-choice"), this.choice);
    byId("theme").setAttribute("aria-label", `Theme: ${this.choice}`);
    this.onPaint(theme);
  }
}
