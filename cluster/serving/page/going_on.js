// An answer that outlives its connections: asked for again behind the tokens that have come.

import { Refused } from "./api.js";

const PATIENCE_MS = 120_000; // without a token
const FIRST_PATIENCE_MS = 5_000; // for an answer that has not begun: HAProxy is there again after 0.1 s
const FIRST_WAIT_MS = 100;
const MAX_WAIT_MS = 2_000;
const AWAY = [429, 502, 503, 504]; // statuses of a server that is busy, or not there now
const AWAY_CODE = "service_unavailable"; // of an error in a stream that has begun

/** A seed for a request: without one no server could go on with its answer. */
export function newSeed() {
  return Math.floor(Math.random() * Number.MAX_SAFE_INTEGER);
}

/**
 * The events of one answer of a chat with token ids, however many connections they take.
 *
 * ask: takes the token ids that have come, and returns the events of a stream that goes on behind them.
 * onPause: called with true when the answer waits for a connection, with false when it goes on.
 * Throws the last error when patience is over. Throws a refusal at once, unless the answer has begun and the status is
 * one of AWAY.
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
        if (event.error) throw new Refused(event.error.code === AWAY_CODE ? 503 : 200, event.error.message);
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
