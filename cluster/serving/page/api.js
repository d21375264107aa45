// Calls this server: the key goes along in a header, errors become one readable line, streams become events.

import { keep as keepInBrowser, kept } from "./storage.js";

const STORED = "moe-cluster-key";

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export class Api {
  constructor() {
    this.key = kept("sessionStorage", STORED) ?? "";
  }

  /** keep: until the tab is closed; else until the page is. */
  use(key, keep) {
    this.key = key.trim();
    keepInBrowser("sessionStorage", STORED, keep && this.key ? this.key : null);
  }

  /** A response with a good status. Throws Refused, and what `fetch` throws. */
  async call(path, { body, signal } = {}) {
    const headers = this.key ? { authorization: `Bearer ${this.key}` } : {};
    if (body !== undefined) headers["content-type"] = "application/json";
    const response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      credentials: "omit",
      cache: "no-store",
    });
    if (!response.ok) throw new Refused(response.status, await reason(response));
    return response;
  }

  /** The events of a stream: {event, data}, data as text. */
  async *events(path, options) {
    const response = await this.call(path, options);
    yield* parseEvents(response.body.pipeThrough(new TextDecoderStream()));
  }
}

async function reason(response) {
  try {
    const body = await response.json();
    if (typeof body?.error?.message === "string") return body.error.message;
  } catch {
    // no JSON: a proxy's own page
  }
  return `the server answered with status ${response.status}`;
}

/** Source: WHATWG HTML, section 9.2.6, without ids and retry. */
export async function* parseEvents(texts) {
  let rest = "";
  let event = "";
  let data = [];
  const reader = texts.getReader();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield { event: event || "message", data: data.join("\n") };
          event = "";
          data = [];
        } else if (!line.startsWith(":")) {
          const colon = line.indexOf(":");
          const field = colon < 0 ? line : line.slice(0, colon);
          const text = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
          if (field === "data") data.push(text);
          else if (field === "event") event = text;
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
