import { describe, expect, it } from 'vitest'
import { rankerBatch } from '#lib/data/ranking/ranker_inputs.js'
import { shortenHistories } from '#lib/data/ranking/shorten.js'
import { parseTasks, type Supervision, taskTargets } from '#lib/data/ranking/tasks.js'
import {
  type LengthSelection,
  lengthSelections,
  newLengthCounts,
  StochasticLength,
  sparsityReport,
} from '#lib/data/stochastic_length.js'
import type { GenerativeRankerConfig } from '#lib/models/generative_ranker.js'
import { Random } from '#lib/random.js'
import { scope } from '#lib/tensor.js'
import { randomRequests } from '../models/requests.js'

const steady = (length: number) => ({ times: BigInt64Array.from({ length }, (_, i) => BigInt(60 * i)) })
const keptOf = (chosen: Uint8Array | null, length: number) => chosen?.reduce((sum, x) => sum + x, 0) ?? length

describe('Stochastic Length', () => {
  it('keeps tau = floor(N^(alpha / 2)) tokens of what is longer', () => {
    expect(new StochasticLength(1.6, 4096).bound).toBe(776)
    expect(new StochasticLength(1.8, 1024).bound).toBe(512)
    expect(new StochasticLength(2, 2048).bound).toBe(2048)
    for (const [alpha, N, message] of [
      [1, 64, /alpha must be in \(1, 2\], got 1/],
      [2.1, 64, /got 2.1/],
      [1.5, 0, /maxTokens must be a positive integer, got 0/],
    ] as const)
      expect(() => new StochasticLength(alpha, N)).toThrow(
        expect.objectContaining({ code: 'ERR_HSTU_INVALID_ARGUMENT', message: expect.stringMatching(message) }),
      )
  })

  it.each([40, 3000])('keeps the rows of the smallest keys that fit, by tokens, those wanted last: %i rows', L => {
    const lengths = new StochasticLength(1.2, L, 'random')
    for (let seed = 0; seed < 20; seed++) {
      const [random, draws] = [new Random(seed), new Random(`rows ${seed}`)]
      const tokens = Uint8Array.from({ length: L }, () => 1 + draws.int(3))
      const wanted = Uint8Array.from({ length: L }, () => Number(draws.int(30) === 0))
      const chosen = lengths.choose({ ...steady(L), tokens, wanted }, random)
      const same = new Random(seed)
      const total = tokens.reduce((sum, x) => sum + x, 0)
      if (same.float() < lengths.wholeProbability(total)) expect(chosen).toBeNull()
      if (!chosen) continue
      const keys = Array.from(tokens, () => same.float()).map((key, i) => (wanted[i] ? -1 / (1 + key) : key))
      const stays = new Uint8Array(L)
      let room = lengths.bound
      for (const i of keys.map((_, i) => i).sort((i, j) => keys[i]! - keys[j]!)) {
        room -= tokens[i]!
        if (room < 0) break
        stays[i] = 1
      }
      expect(chosen).toEqual(stays)
    }
  })

  it.each(lengthSelections)('agrees with the closed form within 3 sigma: %s', selection => {
    // E[n'] = tau (1 + r - r^2), E[n'^2] = tau^2 (2 - r^2), r = tau / n
    const [N, alpha, samples] = [400, 1.6, 3000]
    const lengths = new StochasticLength(alpha, N, selection)
    const tau = N ** (alpha / 2)
    for (const n of [130, 200, 400]) {
      const random = new Random(`${selection} ${n}`)
      const rows = steady(n)
      let [sum, squares] = [0, 0]
      for (let i = 0; i < samples; i++) {
        const kept = keptOf(lengths.choose(rows, random), n)
        expect([n, lengths.bound]).toContain(kept)
        sum += kept
        squares += kept ** 2
      }
      const r = tau / n
      const [mean, square] = [tau * (1 + r - r ** 2), tau ** 2 * (2 - r ** 2)]
      const [p, whole, cut] = [r ** 2, n, tau]
      const sigma = (power: number) => Math.sqrt((p * (1 - p)) / samples) * (whole ** power - cut ** power)
      // tau is floored: at most one token, or 2 tau, below
      expect(Math.abs(sum / samples - mean)).toBeLessThan(3 * sigma(1) + 1)
      expect(Math.abs(squares / samples - square)).toBeLessThan(3 * sigma(2) + 2 * tau)
      const expected = lengths.expected(n)
      expect(Math.abs(sum / samples - expected.length)).toBeLessThan(3 * sigma(1))
      expect(Math.abs(squares / samples - expected.square)).toBeLessThan(3 * sigma(2))
      expect(Math.abs(expected.length - mean)).toBeLessThan(1)
    }
    expect(lengths.choose(steady(lengths.bound), new Random(1))).toBe(null)
  })

  // Zhai et al. 2024, table 3 (30 days), in per cent; lengths by a distribution that was fitted to it, for they are not published.
  const table: Record<number, number[]> = {
    1.6: [71.5, 76.1, 80.5, 84.4],
    1.7: [56.1, 63.6, 69.8, 75.6],
    1.8: [40.2, 45.3, 54.1, 66.4],
    1.9: [17.2, 21.0, 36.3, 64.1],
    2: [3.1, 6.6, 29.1, 64.1],
  }
  const fitted = [
    [0, 0.019],
    [384, 0.034],
    [1024, 0.059],
    [2048, 0.37],
    [4032, 0.51],
    [8192, 0.01],
  ] as const

  it("gives the paper's sparsity to a few points with fitted lengths", () => {
    const total = fitted.reduce((sum, [, share]) => sum + share, 0)
    const differences = Object.entries(table).flatMap(([alpha, row]) =>
      row.map((cell, column) => {
        const N = 1024 << column
        const lengths = new StochasticLength(Number(alpha), N, 'recent')
        const random = new Random(`${alpha} ${N}`)
        const counts = newLengthCounts()
        let mean = 0
        for (const [length, share] of fitted) {
          const n = Math.min(length, N)
          mean += (share / total) * lengths.expected(n).length
          for (let i = Math.round(400 * share); i > 0; i--) {
            counts.sequences += 1
            counts.kept += keptOf(lengths.choose(steady(n), random), n)
          }
        }
        const { sparsity } = sparsityReport(counts, lengths)
        expect(Math.abs(100 * sparsity - cell), `alpha ${alpha}, N ${N}`).toBeLessThan(5) // 400 sequences
        return 100 * (1 - mean / N) - cell
      }),
    )
    expect(Math.max(...differences.map(Math.abs))).toBeLessThan(3.5)
    expect(Math.sqrt(differences.reduce((sum, x) => sum + x ** 2, 0) / differences.length)).toBeLessThan(1.7)
  })

  const often = (selection: LengthSelection, times: number[], count: number) => {
    const lengths = new StochasticLength(1.001, times.length, selection)
    Object.assign(lengths, { bound: count, wholeProbability: () => 0 })
    const random = new Random(`often ${selection}`)
    const share = new Float64Array(times.length)
    const rows = { times: BigInt64Array.from(times, BigInt) }
    for (let i = 0; i < 4000; i++)
      for (const [t, kept] of lengths.choose(rows, random)!.entries()) share[t]! += kept / 4000
    return share
  }

  it('chooses the latest, any, or by 1 - age share', () => {
    const times = [0, 60, 90, 100]
    expect(Array.from(often('recent', times, 2), Math.round)).toEqual([0, 0, 1, 1])
    for (const share of often('random', times, 1)) expect(Math.abs(share - 0.25)).toBeLessThan(0.021) // 3 sigma
    // Ages 100, 40, 10, 0 of 150: weights 1/3, 11/15, 14/15, 1
    const weights = [5, 11, 14, 15].map(w => w / 45)
    often('weighted', times, 1).forEach((share, t) => {
      expect(Math.abs(share - weights[t]!), `row ${t}`).toBeLessThan(3 * Math.sqrt((0.25 * 0.75) / 4000) + 1e-3)
    })
    // Two of three without replacement, ages 30, 10, 0: the chance that row 0 (weight 1/4) is among the first two drawn.
    const [a, b, c] = [0.25 / 2, 0.75 / 2, 1 / 2]
    const first = a + (b * a) / (1 - b) + (c * a) / (1 - c)
    expect(Math.abs(often('weighted', [0, 20, 30], 2)[0]! - first)).toBeLessThan(0.023)
    for (const share of often('weighted', [7, 7, 7, 7], 1)) expect(Math.abs(share - 0.25)).toBeLessThan(0.021)
  })
})

describe('histories under Stochastic Length', () => {
  const batch = randomRequests(new Random(1), {
    ...{ histories: [60, 0, 5, 60, 60], candidates: [2, 1, 1, 3, 1], items: 40, users: 9 },
  })
  const tasks = parseTasks(['like = LIKE', 'watch = watch'], batch.schema)
  const lengths = (selection: LengthSelection) => {
    const made = new StochasticLength(1.5, 120, selection)
    Object.assign(made, { wholeProbability: (n: number) => Number(n <= made.bound) })
    return made
  }
  const shorten = (supervise: Supervision, selection: LengthSelection, fusion: 'interleave' | 'add' = 'interleave') => {
    const targets = taskTargets(batch, tasks, { supervise })
    const made = lengths(selection)
    return { made, full: targets, ...shortenHistories(batch, targets, made, fusion, b => new Random(b)) }
  }
  const rowsOf = ({ history }: typeof batch, b: number) =>
    Array.from(
      { length: Number(history.offsets[b + 1]! - history.offsets[b]!) },
      (_, i) => Number(history.offsets[b]!) + i,
    )

  it.each(lengthSelections)('keep rows whole, in order, with their times and labels: %s', selection => {
    const { batch: short, targets, full, counts, made } = shorten('history', selection)
    expect(counts).toMatchObject({ sequences: 5, cut: 3 })
    let labels = 0
    for (let b = 0; b < 5; b++) {
      const [all, kept] = [rowsOf(batch, b), rowsOf(short, b)]
      const tokens = (rows: number[], of: typeof batch) =>
        rows.reduce((sum, t) => sum + (of.history.series[t] === 0 ? 2 : 1), 0)
      if (tokens(all, batch) <= made.bound) expect(kept.length).toBe(all.length)
      else {
        expect(tokens(kept, short)).toBeLessThanOrEqual(made.bound)
        expect(tokens(kept, short)).toBeGreaterThan(made.bound - 2)
      }
      // Times may be equal: rows are found again in order.
      let at = 0
      const origin = kept.map(t => {
        const same = (s: number) =>
          batch.history.times[s] === short.history.times[t] && batch.history.items[s] === short.history.items[t]
        while (!same(all[at]!)) at++
        return all[at++]!
      })
      for (const [i, t] of kept.entries()) {
        expect(short.history.actions[t]).toBe(batch.history.actions[origin[i]!])
        expect(short.history.series[t]).toBe(batch.history.series[origin[i]!])
      }
      const from = batch.supervisedFrom[b]!
      expect(short.supervisedFrom[b]).toBe(origin.filter(s => s - all[0]! < from).length)
      labels += all
        .filter(s => full.historyWeights[2 * s]! + full.historyWeights[2 * s + 1]! > 0)
        .filter(s => !origin.includes(s)).length
    }
    expect(counts.labels).toBe(labels)
    const supervised = (of: Float32Array) => of.reduce((sum, weight) => sum + weight, 0)
    expect(supervised(targets.historyWeights)).toBeLessThan(supervised(full.historyWeights))
    expect(targets.historyWeights.length).toBe(2 * short.history.items.length)
    expect(targets.labels).toEqual(full.labels)
    expect(counts.kept).toBeLessThan(counts.tokens)
  })

  it('take rows without a loss first, and the same rows whoever else is in the batch', () => {
    const narrow = { ...batch, supervisedFrom: batch.supervisedFrom.map((_, b) => rowsOf(batch, b).length - 3) }
    const targets = taskTargets(narrow, tasks, { supervise: 'history' })
    for (const selection of lengthSelections) {
      const short = shortenHistories(narrow, targets, lengths(selection), 'interleave', b => new Random(b))
      expect(short.counts.labels).toBe(0)
      const weights = (of: Float32Array) => of.reduce((sum, weight) => sum + weight, 0)
      expect(weights(short.targets.historyWeights)).toBe(weights(targets.historyWeights))
      expect(weights(targets.historyWeights)).toBeGreaterThan(3)
    }
  })

  it('have the positions of what stays and the times of before', () => {
    const { batch: short, targets } = shorten('history', 'weighted')
    const config: GenerativeRankerConfig = {
      vocabulary: { users: 9, items: 40, contextual: [4], series: [3] },
      ...{ actions: 2, tasks: tasks.map(({ name, kind }) => ({ name, kind })), dim: 4, layers: 1, heads: 1, qkDim: 4 },
      ...{ vDim: 4, scalingSeqLen: 130, positions: 130, inputDropout: 0, linearDropout: 0 },
    }
    scope(() => {
      const { inputs } = rankerBatch(short, targets, config)
      const [offsets, positions, times] = [inputs.seqOffsets, inputs.positions!, inputs.times!].map(tensor =>
        Array.from(tensor.dataSync(), Number),
      ) as [number[], number[], number[]]
      for (let b = 0; b < 5; b++) {
        const tokens = rowsOf(short, b).flatMap(t => (short.history.series[t] === 0 ? [t, t] : [t]))
        const K = Number(short.candidates.offsets[b + 1]! - short.candidates.offsets[b]!)
        const h = 2 + tokens.length
        const own = <T>(of: T[]) => of.slice(offsets[b], offsets[b + 1])
        expect(own(positions)).toEqual([...Array(h).keys(), ...Array<number>(K).fill(h)])
        expect(own(times).slice(2, h)).toEqual(tokens.map(t => Number(short.history.times[t]!)))
      }
    })
  })

  it('count one token a row where actions are added', () => {
    const { counts, made } = shorten('candidates', 'weighted', 'add')
    expect(counts.tokens).toBe(185)
    expect(counts.kept).toBe(3 * made.bound + 5)
    expect(sparsityReport(counts, made)).toMatchObject({
      ...{ meanLength: 37, sparsity: 1 - (3 * made.bound + 5) / 5 / 120, padding: 1 - 37 / 120 },
    })
  })
})
