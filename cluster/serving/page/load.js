// The load of each expert: now, fading, and over the last minute. Knows no drawing.

const FADE_S = 0.7; // in which a cell loses half of its light
const MEAN_S = 20; // half-life of the mean that stands for the last minute
const LEAST_PEAK = 1;

export class Load {
  constructor() {
    this.take(null);
  }

  /** placement: {layer_ids, num_experts, owners}, null for none. Keeps the loads where the experts are the same. */
  take(placement) {
    const same = placement && this.placement &&
      placement.num_experts === this.placement.num_experts &&
      placement.layer_ids.join() === this.placement.layer_ids.join();
    this.placement = placement;
    if (same) return;
    const size = placement ? placement.layer_ids.length * placement.num_experts : 0;
    this.light = new Float64Array(size); // tokens/s, fading
    this.mean = new Float64Array(size); // tokens/s
    this.peak = LEAST_PEAK;
    this.litAt = 0;
  }

  get columns() {
    return this.placement?.num_experts ?? 0;
  }

  get rows() {
    return this.placement?.layer_ids.length ?? 0;
  }

  /** tokens: [layers][experts] in `interval` seconds, null for none; now: seconds. */
  beat(tokens, interval, now) {
    if (!this.placement || interval <= 0) return;
    this.fade(now);
    const kept = 0.5 ** (interval / MEAN_S);
    let most = 0;
    for (let row = 0; row < this.rows; row += 1) {
      for (let column = 0; column < this.columns; column += 1) {
        const cell = row * this.columns + column;
        const rate = (tokens?.[row]?.[column] ?? 0) / interval;
        this.mean[cell] = this.mean[cell] * kept + rate * (1 - kept);
        this.light[cell] = Math.max(this.light[cell], rate);
        most = Math.max(most, rate);
      }
    }
    this.peak = Math.max(most, this.peak * 0.5 ** (interval / 10), LEAST_PEAK); // the scale follows slowly
  }

  /** Lets the light fade until now. Returns whether any is left. */
  fade(now) {
    const kept = 0.5 ** (Math.max(0, now - this.litAt) / FADE_S);
    this.litAt = now;
    let left = false;
    for (let cell = 0; cell < this.light.length; cell += 1) {
      this.light[cell] *= kept;
      if (this.light[cell] < 0.004 * this.peak) this.light[cell] = 0;
      else left = true;
    }
    return left;
  }

  owners(row, column) {
    return this.placement?.owners[row]?.[column] ?? [];
  }

  /** Of a layer: tokens/s, experts in use, the busiest [{expert, share}], experts with copies. */
  layer(row, top = 3) {
    const means = Array.from(this.mean.subarray(row * this.columns, (row + 1) * this.columns));
    const total = means.reduce((sum, mean) => sum + mean, 0);
    const used = means.filter((mean) => mean > 0.01).length;
    const busiest = means
      .map((mean, expert) => ({ expert, share: total ? mean / total : 0 }))
      .filter(({ share }) => share > 0)
      .sort((a, b) => b.share - a.share)
      .slice(0, top);
    const copied = means.filter((_, expert) => this.owners(row, expert).length > 1).length;
    return { total, used, busiest, copied };
  }
}
