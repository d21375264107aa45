// Follows /cluster/live while the page is seen: hands on its events, comes again when the stream ends.

const AGAIN_MS = [500, 1000, 2000, 4000, 8000];

export class Live {
  /** handlers: cluster, placement, beat take the events' values; state takes "live", "paused" or an error. */
  constructor(api, handlers) {
    this.api = api;
    this.handlers = handlers;
    this.failures = 0;
    this.stream = null;
    document.addEventListener("visibilitychange", () => this.restart());
  }

  /** Begins anew: with another key, or because the page is seen again. */
  restart() {
    this.stream?.abort();
    clearTimeout(this.timer);
    this.failures = 0;
    if (document.hidden) this.handlers.state("paused");
    else this.follow();
  }

  async follow() {
    const stream = new AbortController();
    this.stream = stream;
    try {
      for await (const { event, data } of this.api.events("cluster/live", { signal: stream.signal })) {
        const value = JSON.parse(data);
        if (event === "message") throw new Error(value?.error?.message ?? "the stream broke off");
        this.failures = 0;
        this.handlers.state("live");
        this.handlers[event]?.(value);
      }
      this.again(AGAIN_MS[0]); // a server that stops ends each stream at once
    } catch (error) {
      if (stream.signal.aborted) return;
      this.handlers.state(error);
      this.again(AGAIN_MS[Math.min(this.failures, AGAIN_MS.length - 1)]);
      this.failures += 1;
    }
  }

  again(wait) {
    this.timer = setTimeout(() => this.follow(), wait);
  }
}
