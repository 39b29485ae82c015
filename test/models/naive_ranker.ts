// GenerativeRanker from its equations: one request at a time, token by token, plain float64.
import type { RequestBatch } from '#lib/data/ranking/schema.js'
import type { GenerativeRanker } from '#lib/models/generative_ranker.js'
import { beside, columns, dot, layerNorm, type Matrix, map, matrix, plus, plusRow, silu, times } from './naive.js'

interface Token {
  x: number[]
  time: number
  kind: 'contextual' | 'item' | 'actions' | 'series' | 'candidate'
  /** Row of the history. */
  row: number
}

const seconds = (time: bigint) => Number(time)

/**
 * Logits of one request: of the history rows in `rows`, then of its candidates.
 * @param b which request of the batch
 * @param rows among the request's own, from 0
 */
export function naiveRanker(model: GenerativeRanker, batch: RequestBatch, b: number, rows: readonly number[]): Matrix {
  const { config } = model
  const { vocabulary, actions: K, dim, fusion = 'interleave', positions = 0, actionDim = 8 } = config
  const vector = (name: string) => Array.from(model.parameters[name]!.dataSync() as Float64Array)
  const table = (name: string) => matrix(vector(name), model.parameters[name]!.shape[1]!)

  // y = (z sigmoid(LN(z))) W_2 + b_2, z = x W_1 + b_1 + state
  const mlp = (name: string, x: Matrix, state?: Matrix): Matrix => {
    let z = plusRow(times(x, table(`${name}.hidden`)), vector(`${name}.hiddenBias`))
    if (state) z = plus(z, state)
    const normed = layerNorm(z, 1e-6, vector(`${name}.swishWeight`), vector(`${name}.swishBias`))
    const gated = z.map((row, i) => row.map((value, j) => value / (1 + Math.exp(-normed[i]![j]!))))
    return plusRow(times(gated, table(`${name}.output`)), vector(`${name}.outputBias`))
  }
  const encoded = (name: string, x: number[]): number[] =>
    layerNorm(mlp(name, [x]), 1e-6, vector(`${name}.normWeight`), vector(`${name}.normBias`))[0]!

  // One table for user, contextual features, items, values of auxiliary series, one below the other, each with a row 0.
  const sizes = [vocabulary.users, ...vocabulary.contextual, vocabulary.items, ...vocabulary.series]
  const base = (f: number) => sizes.slice(0, f).reduce((sum, size) => sum + size + 1, 0)
  const C = 1 + vocabulary.contextual.length
  const content = (f: number, number: bigint) => encoded('content', table('table')[base(f) + Number(number)]!)
  const bits = (mask: number) => table('actions').flatMap((row, k) => row.map(value => ((mask >> k) & 1) * value))
  const action = (mask: number) => encoded('action', bits(mask))
  const pending = () => encoded('action', table('pending').flat())
  if (bits(0).length !== K * actionDim) throw new Error('the actions have another width')

  const sum = (x: number[], y: number[]) => x.map((value, j) => value + y[j]!)
  const interleave = fusion === 'interleave'
  const event = (x: number[], mask: number) => (interleave ? x : sum(x, action(mask)))
  const tokens: Token[] = []
  const push = (x: number[], time: bigint, kind: Token['kind'], row = -1) =>
    tokens.push({ x, time: seconds(time), kind, row })
  const now = batch.times[b]!
  const F = vocabulary.contextual.length
  push(event(content(0, batch.users[b]!), 0), now, 'contextual')
  for (let c = 0; c < F; c++) push(event(content(1 + c, batch.contextual[b * F + c]!), 0), now, 'contextual')
  const first = Number(batch.history.offsets[b])
  for (let t = first; t < Number(batch.history.offsets[b + 1]); t++) {
    const [series, mask] = [batch.history.series[t]!, batch.history.actions[t]!]
    const x = content(C + series, batch.history.items[t]!)
    push(event(x, mask), batch.history.times[t]!, series === 0 ? 'item' : 'series', t - first)
    if (interleave && series === 0) push(action(mask), batch.history.times[t]!, 'actions', t - first)
  }
  const h = tokens.length
  for (let m = Number(batch.candidates.offsets[b]); m < Number(batch.candidates.offsets[b + 1]); m++) {
    const x = content(C, batch.candidates.items[m]!)
    push(interleave ? x : sum(x, pending()), now, 'candidate')
  }

  const P = positions > 0 ? table('positions') : null
  let x: Matrix = tokens.map((token, i) => (P ? sum(token.x, P[Math.min(i, h)]!) : token.x))
  for (let layer = 0; layer < config.layers; layer++) x = hstuLayer(x, `layers.${layer}`)
  if (x[0]!.length !== dim) throw new Error('tokens have another width')

  const predicted = [
    ...rows.map(row => tokens.findIndex(token => token.row === row && token.kind !== 'actions')),
    ...tokens.flatMap((token, i) => (token.kind === 'candidate' ? [i] : [])),
  ]
  const before = predicted.map(i => x[Math.min(i, h) - 1]!)
  return mlp(
    'head',
    predicted.map(i => x[i]!),
    times(before, table('state')),
  )

  function hstuLayer(input: Matrix, name: string): Matrix {
    const { heads: H, qkDim: D, vDim: V, scalingSeqLen: N, siluAll = true, concat = false, activation } = config
    const p = (key: string) => vector(`${name}.${key}`)
    const xn = layerNorm(input, 1e-6, p('inputNormWeight'), p('inputNormBias'))
    const z = plusRow(times(xn, table(`${name}.uvqk`)), p('uvqkBias'))
    const ends = [0, H * V, 2 * H * V, 2 * H * V + H * D, 2 * H * V + 2 * H * D]
    const [u, v, q, k] = [0, 1, 2, 3].map(part => {
      const own = columns(z, ends[part]!, ends[part + 1]!)
      return part === 0 || siluAll ? map(own, silu) : own
    }) as [Matrix, Matrix, Matrix, Matrix]
    const place = (i: number) => Math.min(i, h)
    const positionBias = config.positionBias === false ? null : p('positionBias')
    const timeBias = config.timeBias === false ? null : p('timeBias')
    const bias = (i: number, j: number) => {
      let rab = positionBias ? positionBias[Math.min(Math.abs(place(i) - place(j)), N - 1)]! : 0
      if (timeBias && i >= C && j >= C) {
        const age = Math.abs(tokens[i]!.time - tokens[j]!.time)
        rab += timeBias[Math.min(Math.trunc(Math.log(Math.max(1, age)) / 0.301), timeBias.length - 1)]!
      }
      return rab
    }
    const sees = (i: number, j: number) => i === j || (j < h && (j < i || (config.contextualFull === true && i < C)))
    const parts = Array.from({ length: H }, (_, head) =>
      input.map((_, i) => {
        const cut = (row: number[]) => row.slice(head * D, (head + 1) * D)
        const keys = input.flatMap((_, j) => (sees(i, j) ? [j] : []))
        const scores = keys.map(j => dot(cut(q[i]!), cut(k[j]!)) / Math.sqrt(D) + bias(i, j))
        const total = scores.reduce((all, score) => all + Math.exp(score), 0)
        const weights = scores.map(score => (activation === 'softmax' ? Math.exp(score) / total : silu(score) / N))
        return Array.from({ length: V }, (_, c) =>
          keys.reduce((all, j, at) => all + weights[at]! * v[j]![head * V + c]!, 0),
        )
      }),
    )
    const o = beside(parts)
    const normed = layerNorm(o, 1e-6, p('outputNormWeight'), p('outputNormBias'))
    const gated = u.map((row, i) => row.map((value, j) => value * normed[i]![j]!))
    const inner = concat ? beside([u, o, gated]) : gated
    return plus(input, plusRow(times(inner, table(`${name}.output`)), p('outputBias')))
  }
}
