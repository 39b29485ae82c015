export interface Table {
  rows: number
  cols: number
  data: Float64Array
}

/** One call in logical form: keys of a sequence stand together wherever the op finds them; queries are its last `queries` rows. */
export interface Problem {
  H: number
  D: number
  V: number
  lengths: number[]
  queries: number[]
  targets: number[]
  contextual: number[]
  W: number
  F: number
  g: number
  causal: boolean
  full: boolean
  alpha: number
  scales: Float64Array
  softmax: boolean
  dropout: number
  seed: bigint
  offset: bigint
  N: number
  q: Float64Array
  k: Float64Array
  v: Float64Array
  pos: Table | null
  time: Table | null
  queryTime: BigInt64Array
  keyTime: BigInt64Array
}

export function sees(p: Problem, b: number, i: number, j: number): boolean {
  const h = p.lengths[b]! - p.targets[b]!
  const C = Math.min(p.contextual[b]!, h)
  const group = (x: number) => Math.floor((x - h) / p.g)
  if (i < h) {
    if (p.full && i < C) return j < h
    if (p.causal ? j > i : j >= h) return false
    return p.W === 0 || Math.abs(i - j) <= p.W || j < C || i >= h - p.F
  }
  if (j >= h) return group(j) === group(i) && j <= i
  return p.W === 0 || p.F > 0 || h - j <= p.W || j < C
}

/** ceil(exp(0.301 k)), k = 1 to 145, in fixed point of 300 bits: doubles are off by one from 1e12 on. */
export const thresholds: bigint[] = []
export const one = 1n << 300n
export let factor = 0n
for (let n = 0n, term = one; term > 0n; term = (term * 301n) / (1000n * ++n)) factor += term
for (let power = factor; thresholds.length < 145; power = (power * factor) / one) thresholds.push(power / one + 1n)
export const thresholdNumbers = Float64Array.from(thresholds, Number)

/** Number of k >= 1 with |a - b| >= ceil(exp(0.301 k)). */
export function bucketOf(a: bigint, b: bigint): number {
  const d = a > b ? a - b : b - a
  if (d > 1n << 50n) return thresholds.filter(threshold => d >= threshold).length
  const small = Number(d)
  let [low, high] = [0, 145]
  while (low < high) {
    const middle = (low + high) >> 1
    if (small >= thresholdNumbers[middle]!) low = middle + 1
    else high = middle
  }
  return low
}

export const mask64 = (1n << 64n) - 1n
export const mask32 = 0xffffffffn

/** Philox4x32-10 of the paper, word by word. */
export function philox(key: bigint, counter: bigint): number[] {
  let [k0, k1] = [key & mask32, (key >> 32n) & mask32]
  let c = [counter & mask32, (counter >> 32n) & mask32, 0n, 0n]
  for (let round = 0; round < 10; round++) {
    const a = 0xd2511f53n * c[0]!
    const b = 0xcd9e8d57n * c[2]!
    c = [(b >> 32n) ^ c[1]! ^ k0, b & mask32, (a >> 32n) ^ c[3]! ^ k1, a & mask32]
    k0 = (k0 + 0x9e3779b9n) & mask32
    k1 = (k1 + 0xbb67ae85n) & mask32
  }
  return c.map(Number)
}

/**
 * Output and gradients. The sizes are what float32 errors are measured against where terms cancel: for the tables sums of |dS|; for
 * softmax dS = P (dP - D) may itself be the small difference of large terms, so there |dP| + |D| stands for it.
 */
export function oracle(p: Problem, dout: Float64Array | null) {
  const { H, D, V, q, k, v } = p
  const out = new Float64Array((q.length / D) * V)
  const [dq, dk, dv] = [new Float64Array(q.length), new Float64Array(k.length), new Float64Array(v.length)]
  const [dqSize, dkSize] = [new Float64Array(q.length), new Float64Array(k.length)]
  const [dpos, dposSize] = [new Float64Array(p.pos?.data.length ?? 0), new Float64Array(p.pos?.data.length ?? 0)]
  const [dtime, dtimeSize] = [new Float64Array(p.time?.data.length ?? 0), new Float64Array(p.time?.data.length ?? 0)]
  const [s, w, keep] = [new Float64Array(p.N), new Float64Array(p.N), new Float64Array(p.N)]
  const [seen, posAt, timeAt] = [new Int32Array(p.N), new Int32Array(p.N), new Int32Array(p.N)]
  let [key0, query0] = [0, 0]
  p.lengths.forEach((L, b) => {
    const h = L - p.targets[b]!
    const C = Math.min(p.contextual[b]!, h)
    for (let row = 0; row < p.queries[b]!; row++) {
      const i = row + L - p.queries[b]!
      let n = 0
      for (let j = 0; j < L; j++) if (sees(p, b, i, j)) seen[n++] = j
      for (let x = 0; x < n; x++) {
        const j = seen[x]!
        posAt[x] = p.pos ? Math.min(Math.abs(Math.min(i, h) - Math.min(j, h)), p.pos.cols - 1) : 0
        timeAt[x] = -1
        if (p.time && i >= C && j >= C)
          timeAt[x] = Math.min(bucketOf(p.queryTime[query0 + row]!, p.keyTime[key0 + j]!), p.time.cols - 1)
      }
      for (let head = 0; head < H; head++) {
        const qi = ((query0 + row) * H + head) * D
        const oi = ((query0 + row) * H + head) * V
        const posRow = p.pos && p.pos.rows > 1 ? head * p.pos.cols : 0
        const timeRow = p.time && p.time.rows > 1 ? head * p.time.cols : 0
        for (let x = 0; x < n; x++) {
          const kj = ((key0 + seen[x]!) * H + head) * D
          let score = 0
          for (let d = 0; d < D; d++) score += q[qi + d]! * k[kj + d]!
          score *= p.alpha
          if (p.pos) score += p.pos.data[posRow + posAt[x]!]!
          if (timeAt[x]! >= 0) score += p.time!.data[timeRow + timeAt[x]!]!
          s[x] = score
          keep[x] = 1
          if (p.dropout > 0) {
            const element = (BigInt(b * H + head) * BigInt(p.N) + BigInt(i)) * BigInt(p.N) + BigInt(seen[x]!)
            const word = philox(p.seed, (p.offset + element / 4n) & mask64)[Number(element % 4n)]!
            keep[x] = word >= Math.floor(p.dropout * 2 ** 32) ? 1 / (1 - p.dropout) : 0
          }
        }
        let scale = p.scales[query0 + row]!
        if (p.softmax) {
          scale = 1
          let most = -Infinity
          let total = 0
          for (let x = 0; x < n; x++) most = Math.max(most, s[x]!)
          for (let x = 0; x < n; x++) total += w[x] = Math.exp(s[x]! - most)
          for (let x = 0; x < n; x++) w[x]! /= total
        } else for (let x = 0; x < n; x++) w[x] = s[x]! / (1 + Math.exp(-s[x]!))
        for (let x = 0; x < n; x++) {
          const vj = ((key0 + seen[x]!) * H + head) * V
          const weight = scale * w[x]! * keep[x]!
          for (let d = 0; d < V; d++) out[oi + d]! += weight * v[vj + d]!
        }
        if (!dout) continue
        let mean = 0
        if (p.softmax) for (let d = 0; d < V; d++) mean += dout[oi + d]! * out[oi + d]!
        for (let x = 0; x < n; x++) {
          const kj = ((key0 + seen[x]!) * H + head) * D
          const vj = ((key0 + seen[x]!) * H + head) * V
          let dw = 0
          for (let d = 0; d < V; d++) dw += dout[oi + d]! * v[vj + d]!
          dw *= scale * keep[x]!
          const sig = 1 / (1 + Math.exp(-s[x]!))
          const ds = p.softmax ? w[x]! * (dw - mean) : dw * sig * (1 + s[x]! * (1 - sig))
          const size = p.softmax ? w[x]! * (Math.abs(dw) + Math.abs(mean)) : Math.abs(ds)
          const weight = scale * w[x]! * keep[x]!
          for (let d = 0; d < V; d++) dv[vj + d]! += weight * dout[oi + d]!
          for (let d = 0; d < D; d++) {
            dq[qi + d]! += p.alpha * ds * k[kj + d]!
            dk[kj + d]! += p.alpha * ds * q[qi + d]!
            if (!p.softmax) continue
            dqSize[qi + d]! += p.alpha * size * k[kj + d]!
            dkSize[kj + d]! += p.alpha * size * q[qi + d]!
          }
          if (p.pos) {
            dpos[posRow + posAt[x]!]! += ds
            dposSize[posRow + posAt[x]!]! += size
          }
          if (timeAt[x]! >= 0) {
            dtime[timeRow + timeAt[x]!]! += ds
            dtimeSize[timeRow + timeAt[x]!]! += size
          }
        }
      }
    }
    key0 += L
    query0 += p.queries[b]!
  })
  return { out, dq, dk, dv, dpos, dtime, dqSize, dkSize, dposSize, dtimeSize }
}

// ---- Running the op on a problem ------------------------------------------------------------------------------------------
