/** Buckets a factor of 2^(1/4) apart from one microsecond on: any quantile is within 19 % of its bucket's lower edge. */
const PER_OCTAVE = 4
const LEAST_MS = 1e-3
const BUCKETS = 30 * PER_OCTAVE

/** What a histogram has seen; milliseconds. */
export interface HistogramSummary {
  count: number
  sum: number
  max: number
  p50: number
  p90: number
  p99: number
}

/** Durations in buckets of growing width: constant memory, and histograms of several engines can be added. */
export class Histogram {
  readonly counts = new Float64Array(BUCKETS)
  count = 0
  sum = 0
  max = 0

  /** @param ms 0 or more */
  add(ms: number): void {
    const bucket = Math.floor(PER_OCTAVE * Math.log2(Math.max(ms, LEAST_MS) / LEAST_MS))
    this.counts[Math.min(bucket, BUCKETS - 1)]! += 1
    this.count += 1
    this.sum += ms
    this.max = Math.max(this.max, ms)
  }

  /** The upper edge of the bucket in which the share `q` of the values is reached; 0 of an empty one. */
  quantile(q: number): number {
    let left = q * this.count
    if (this.count === 0) return 0
    for (let bucket = 0; bucket < BUCKETS; bucket++)
      if ((left -= this.counts[bucket]!) <= 0) return Math.min(this.max, LEAST_MS * 2 ** ((bucket + 1) / PER_OCTAVE))
    return this.max
  }

  summary(): HistogramSummary {
    const { count, sum, max } = this
    return { count, sum, max, p50: this.quantile(0.5), p90: this.quantile(0.9), p99: this.quantile(0.99) }
  }
}
