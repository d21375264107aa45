// An answer that outlives its connections: asked for again behind the tokens that have come.

import { Refused } from "./api.js";

const PATIENCE_MS = 120_000; // without a token
const FIRST_PATIENCE_MS = 5_000; // for an answer that has not begun: HAProxy is there again after 0.1 s
const FIRST_WAIT_MS = 100;
const MAX_WAIT_MS = 2_000;
const AWAY = [429, 502, 503, 504]; // statuses of a server that is busy, or not there now

/** A seed for a request: without one no server could go on with its answer. */
export function newSeed() {
  return Math.floor(Math.random() * Number.MAX_SAFE_INTEGER);
}

/**
 * The events of one answer of a chat with token ids, however many connections they take.
 *
 * ask: the events of a stream of the answer behind these tokens.  onPause: called with true when the answer waits for
 * a connection, with false when it goes on. Throws what `ask` throws: after PATIENCE_MS, and at once where the server
 * refuses an answer that has not begun.
 */
export async function* goingOn(ask, { signal, onPause, now = () => performance.now(), sleep = pause }) {
  const received = [];
  let begun = false;
  let finished = false;
  let waits = FIRST_WAIT_MS;
  let until = now() + FIRST_PATIENCE_MS;
  for (;;) {
    let lost = new Error("the answer broke off");
    try {
      for await (const { data } of ask(received)) {
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new Refused(200, event.error.message);
        if (waits > FIRST_WAIT_MS) onPause(false);
        begun = true;
        waits = FIRST_WAIT_MS;
        until = now() + PATIENCE_MS;
        received.push(...(event.choices?.[0]?.token_ids ?? []));
        finished ||= Boolean(event.choices?.[0]?.finish_reason);
        yield event;
      }
    } catch (error) {
      if (error instanceof Refused && !(begun && AWAY.includes(error.status))) throw error;
      lost = error;
    }
    if (finished || signal.aborted) return;
    if (now() + waits > until) throw lost;
    onPause(true);
    await sleep(waits, signal);
    waits = Math.min(2 * waits, MAX_WAIT_MS);
  }
}

/** Resolves after so many milliseconds, or when the signal aborts. */
function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => resolve(clearTimeout(timer)), { once: true });
  });
}
