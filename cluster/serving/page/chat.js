// A conversation through /v1/chat/completions. An answer is text, whatever stands in it.

import { announce, byId, element, seconds, setText } from "./dom.js";
import { goingOn, newSeed } from "./going_on.js";

const SUGGESTIONS = ["What is an expert?", "What happens when a shard dies?", "How does rebalancing work?"];

export class Chat {
  /** onDenied: called when the server asks for a key. */
  constructor(api, { onDenied }) {
    this.api = api;
    this.onDenied = onDenied;
    this.turns = [];
    this.running = null;
    this.log = byId("log");
    this.question = byId("question");
    byId("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send(this.question.value);
    });
    this.question.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send(this.question.value);
    });
    byId("stop").addEventListener("click", () => this.running?.abort());
    byId("clear").addEventListener("click", () => this.clear());
    for (const text of SUGGESTIONS) {
      byId("suggestions").append(element("li", {}, element("button", { type: "button", onclick: () => this.send(text) }, text)));
    }
  }

  clear() {
    this.running?.abort();
    this.finish();
    this.turns = [];
    for (const turn of this.log.querySelectorAll(".turn")) turn.remove();
    byId("welcome").hidden = false;
    this.question.focus();
    announce("New chat");
  }

  async send(text) {
    if (!text.trim() || this.running) return;
    const before = this.turns;
    const stream = new AbortController();
    this.begin(stream, text);
    const answer = this.show("assistant");
    answer.node.setAttribute("aria-busy", "true");
    announce("Answering");
    try {
      await this.read(stream, answer);
    } catch (error) {
      if (!stream.signal.aborted) this.failed(error, answer);
    }
    answer.node.removeAttribute("aria-busy");
    if (this.running !== stream) return; // a new chat has begun meanwhile
    // A question without an answer is not part of the conversation: a template may want turns to alternate.
    this.turns = answer.text ? [...this.turns, { role: "assistant", content: answer.text }] : before;
    this.end(stream, answer);
  }

  begin(stream, text) {
    this.running = stream;
    this.turns = [...this.turns, { role: "user", content: text }];
    byId("welcome").hidden = true;
    this.show("user", text);
    this.question.value = "";
    byId("stop").hidden = false;
    byId("send").hidden = true;
  }

  end(stream, answer) {
    const stopped = stream.signal.aborted ? "Stopped. " : "";
    setText(answer.note, stopped + answer.note.textContent);
    announce(`${stopped}Answer: ${answer.text || answer.note.textContent}`);
    const focused = document.activeElement === byId("stop");
    this.finish();
    if (focused) this.question.focus();
  }

  finish() {
    this.running = null;
    byId("send").hidden = false;
    byId("stop").hidden = true;
  }

  async read(stream, answer) {
    const began = performance.now();
    let first = null;
    const body = this.body();
    const { signal } = stream;
    const ask = (received) => {
      const rest = received.length ? { ...body, continue_from: received } : body;
      return this.api.events("v1/chat/completions", { body: rest, signal });
    };
    const onPause = (paused) => setText(answer.note, paused ? "The connection is lost. The answer goes on when the server can be reached again." : "");
    for await (const event of goingOn(ask, { signal, onPause })) {
      const piece = event.choices?.[0]?.delta?.content;
      if (piece) {
        first ??= performance.now() - began;
        this.append(answer, piece);
      }
      if (event.usage) {
        const took = (performance.now() - began) / 1000;
        const tokens = event.usage.completion_tokens;
        setText(answer.note, `${tokens} tokens · first after ${seconds((first ?? 0) / 1000)} · ${(tokens / took).toFixed(1)} tokens/s`);
      }
    }
  }

  body() {
    const body = { messages: this.turns, stream: true, stream_options: { include_usage: true } };
    Object.assign(body, { return_token_ids: true, seed: newSeed() }); // so that another connection can go on with it
    const temperature = byId("temperature").valueAsNumber;
    const most = byId("max-tokens").valueAsNumber;
    if (!Number.isNaN(temperature)) body.temperature = temperature;
    if (!Number.isNaN(most)) body.max_tokens = most;
    if (byId("adapter").value) body.model = byId("adapter").value;
    return body;
  }

  append(answer, piece) {
    const atEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 40;
    answer.text += piece;
    answer.body.append(piece);
    if (atEnd) this.log.scrollTop = this.log.scrollHeight;
  }

  failed(error, answer) {
    answer.node.classList.add("failed");
    setText(answer.note, error.message);
    if (error.status === 401) this.onDenied(error.message);
  }

  show(role, text = "") {
    const body = element("p", { class: "text", dir: "auto" }, text);
    const note = element("p", { class: "note" });
    const name = element("span", { class: "unseen" }, role === "user" ? "You:" : "Model:");
    const node = element("article", { class: `turn ${role}` }, name, body, note);
    this.log.append(node);
    this.log.scrollTop = this.log.scrollHeight;
    return { node, body, note, text };
  }
}
