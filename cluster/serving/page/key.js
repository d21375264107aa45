// The dialog for the key.

import { announce, byId } from "./dom.js";

export class KeyDialog {
  /** onChange: called with another key in use. */
  constructor(api, onChange) {
    this.dialog = byId("key-dialog");
    this.input = byId("key-input");
    byId("key").addEventListener("click", () => this.open());
    // Enter uses the key: the first button of a form, Cancel, would be pressed by it.
    this.input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault();
      this.dialog.close("use");
    });
    this.dialog.addEventListener("close", () => {
      const done = this.dialog.returnValue;
      if (done === "use" || done === "forget") {
        api.use(done === "use" ? this.input.value : "", byId("key-keep").checked);
        announce(api.key ? "The key is in use" : "The key is forgotten");
        onChange();
      }
      this.input.value = "";
    });
  }

  open() {
    if (this.dialog.open) return;
    this.dialog.returnValue = "";
    this.dialog.showModal();
    this.input.focus();
  }
}
