import { describe, expect, it } from 'vitest'
import { CountedMetrics } from '#lib/eval/counted_metrics.js'
import { type BinaryMetrics, binaryMetrics } from '#lib/eval/ranking_metrics.js'
import { Random } from '#lib/random.js'

const kinds = ['binary', 'regression', 'binary'] as const
const K = kinds.length

/** Batches of 40 impressions, four of a request, users with tastes of their own. */
function stream(impressions: number) {
  const random = new Random('stream')
  const rows = { logits: [] as number[], labels: [] as number[], weights: [] as number[] }
  const [users, requests]: [bigint[], bigint[]] = [[], []]
  for (let m = 0; m < impressions; m++) {
    if (m % 4 === 0) users.push(BigInt(1 + random.int(500)))
    else users.push(users.at(-1)!)
    requests.push(BigInt(Math.floor(m / 4)))
    for (let k = 0; k < K; k++) {
      const logit = 1.5 * random.normal()
      rows.logits.push(logit)
      rows.labels.push(kinds[k] === 'binary' ? Number(random.float() < 1 / (1 + Math.exp(-logit))) : random.float())
      rows.weights.push([0, 1, 2][random.int(3)]!)
    }
  }
  return { rows, users, requests }
}

const all = stream(8000)
const groupsOf = (by: 'request' | 'user') => (by === 'user' ? all.users : all.requests)

function fill(metrics: CountedMetrics, by: 'request' | 'user', from = 0, to = 8000): CountedMetrics {
  for (let at = from; at < to; at += 40) {
    const cut = (of: number[]) => Float32Array.from(of.slice(at * K, (at + 40) * K))
    const logits = all.rows.logits.slice(at * K, (at + 40) * K)
    metrics.update(
      logits,
      cut(all.rows.labels),
      cut(all.rows.weights),
      BigInt64Array.from(groupsOf(by).slice(at, at + 40)),
    )
  }
  return metrics
}

const column = (of: number[], k: number) => of.filter((_, i) => i % K === k)
const exact = (by: 'request' | 'user', k: number) => {
  const { logits, labels, weights } = all.rows
  return binaryMetrics(column(logits, k), column(labels, k), column(weights, k), groupsOf(by))
}

describe.each(['request', 'user'] as const)('counted metrics, GAUC by %s', by => {
  it('are exact up to the impressions that are kept', () => {
    const found = fill(new CountedMetrics(kinds, by, 8000), by).metrics()
    for (const k of [0, 2]) {
      const wanted = exact(by, k)
      for (const [name, value] of Object.entries(found[k]!))
        expect(value, name).toBeCloseTo(wanted[name as keyof BinaryMetrics], 12)
    }
    const [x, y, w] = [all.rows.logits, all.rows.labels.map(Math.fround), all.rows.weights].map(of => column(of, 1))
    const weight = w!.reduce((sum, each) => sum + each, 0)
    const mean = (f: (difference: number) => number) =>
      w!.reduce((sum, each, m) => sum + each * f(x![m]! - y![m]!), 0) / weight
    expect(found[1]).toEqual({
      ...{
        weight,
        mse: expect.closeTo(
          mean(d => d * d),
          10,
        ),
        mae: expect.closeTo(mean(Math.abs), 10),
      },
    })
  })

  it('beyond them stay in their bounds', () => {
    const metrics = fill(new CountedMetrics(kinds, by, 3000), by)
    const { rows } = metrics.state()
    expect(rows.groups.length).toBeLessThanOrEqual(3000)
    if (by === 'request') expect(rows.groups.length).toBe(0)
    const found = metrics.metrics() as BinaryMetrics[]
    for (const k of [0, 2]) {
      const [own, wanted] = [found[k]!, exact(by, k)]
      for (const name of ['weight', 'baseRate', 'ne', 'accuracy', 'calibration'] as const)
        expect(own[name], name).toBeCloseTo(wanted[name], 12)
      expect(own.aucError).toBeGreaterThan(0)
      expect(own.aucError).toBeLessThan(1e-3)
      expect(Math.abs(own.auc - wanted.auc)).toBeLessThanOrEqual(own.aucError)
      if (by === 'request') expect(own).toMatchObject({ gauc: expect.closeTo(wanted.gauc, 12), gaucShare: 1 })
      else {
        // A quarter of 500 users: all of their impressions, none of the others'.
        expect(own.gaucShare).toBe(0.25)
        const users = new Set(rows.groups)
        expect(users.size).toBeGreaterThan(80)
        expect(users.size).toBeLessThan(180)
        const { logits, labels, weights } = all.rows
        const mine = all.users.flatMap((user, m) => (users.has(user) ? [m] : []))
        expect(mine.length).toBe(rows.groups.length)
        const pick = (of: number[]) => mine.map(m => of[m * K + k]!)
        const sampled = binaryMetrics(
          pick(logits),
          pick(labels),
          pick(weights),
          mine.map(m => all.users[m]!),
        )
        expect([own.gauc, own.gaucRequests]).toEqual([sampled.gauc, sampled.gaucRequests])
        expect(Math.abs(own.gauc - wanted.gauc)).toBeLessThan(0.05)
      }
    }
  })

  it.each([1000, 3000, 8000])('go on from a state as without the stop, %i kept', keep => {
    const whole = fill(new CountedMetrics(kinds, by, keep), by)
    const { json, rows } = fill(new CountedMetrics(kinds, by, keep), by, 0, 4800).state()
    const resumed = new CountedMetrics(kinds, by, keep)
    resumed.setState(JSON.parse(JSON.stringify(json)), rows)
    fill(resumed, by, 4800)
    expect(resumed.metrics()).toEqual(whole.metrics())
    expect(resumed.state()).toEqual(whole.state())
    const other = new CountedMetrics(['binary'], by, keep)
    expect(() => other.setState(json, rows)).toThrow(expect.objectContaining({ code: 'ERR_HSTU_CHECKPOINT' }))
  })
})

it('counted metrics of nothing are not numbers', () => {
  const [like, watch] = new CountedMetrics(['binary', 'regression'], 'request').metrics()
  expect(like).toMatchObject({ weight: 0, ne: Number.NaN, auc: Number.NaN, gauc: Number.NaN })
  expect(watch).toEqual({ weight: 0, mse: Number.NaN, mae: Number.NaN })
  expect(() => new CountedMetrics([], 'user', 0)).toThrow(/keep must be a positive integer, got 0/)
})
