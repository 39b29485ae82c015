import { type FeatureGroup, recency, runningMeans, similarHistory } from '#lib/eval/baseline_features.js'
import { logisticRegression } from '#lib/eval/logistic_baseline.js'
import {
  additiveLogit,
  baseRate,
  evaluateBaselines,
  itemPopularity,
  type OnlineBaseline,
} from '#lib/eval/ranking_baselines.js'
import { auc, binaryMetrics, crossEntropy, groupedAuc, StreamingMetrics } from '#lib/eval/ranking_metrics.js'
import { Random } from '#lib/random.js'

const random = new Random('metrics')
/** Logits with ties, labels that follow them, weights of which a third is 0. */
const sample = (n: number) => ({
  logits: Array.from({ length: n }, () => Math.round(8 * random.normal()) / 4),
  labels: Array.from({ length: n }, () => random.int(2)),
  weights: Array.from({ length: n }, () => [0, 1, 2.5][random.int(3)]!),
  requests: Array.from({ length: n }, (_, i) => Math.floor(i / 7)),
})
/** All pairs. */
function pairs(scores: number[], labels: number[], weights: number[]): number {
  let [won, all] = [0, 0]
  scores.forEach((up, i) => {
    scores.forEach((down, j) => {
      if (labels[i] !== 1 || labels[j] !== 0) return
      const weight = weights[i]! * weights[j]!
      all += weight
      won += weight * (up > down ? 1 : up === down ? 0.5 : 0)
    })
  })
  return won / all
}

describe('metrics', () => {
  const { logits, labels, weights, requests } = sample(400)
  const p = logits.map(x => 1 / (1 + Math.exp(-x)))
  const mean = (f: (i: number) => number) =>
    weights.reduce((sum, w, i) => sum + w * f(i), 0) / weights.reduce((sum, w) => sum + w, 0)

  it('agree with their definitions', () => {
    const found = binaryMetrics(logits, labels, weights, requests)
    const rate = mean(i => labels[i]!)
    const entropy = -(rate * Math.log(rate) + (1 - rate) * Math.log(1 - rate))
    expect(found.baseRate).toBeCloseTo(rate, 12)
    expect(found.ne).toBeCloseTo(mean(i => -Math.log(labels[i] === 1 ? p[i]! : 1 - p[i]!)) / entropy, 10)
    expect(found.accuracy).toBeCloseTo(
      mean(i => Number(p[i]! > 0.5 === (labels[i] === 1))),
      12,
    )
    expect(found.calibration).toBeCloseTo(mean(i => p[i]!) / rate, 12)
    expect(found.auc).toBeCloseTo(pairs(logits, labels, weights), 12)
    const each = [...new Set(requests)].flatMap(request => {
      const own = requests.flatMap((other, i) => (other === request && weights[i]! > 0 ? [i] : []))
      return own.length === 0
        ? []
        : [pairs(...([logits, labels, weights].map(of => own.map(i => of[i]!)) as [number[], number[], number[]]))]
    })
    const both = each.filter(x => !Number.isNaN(x))
    expect(found.gauc).toBeCloseTo(both.reduce((sum, x) => sum + x, 0) / both.length, 12)
    expect([found.gaucRequests, found.gaucSkipped]).toEqual([both.length, each.length - both.length])
    expect(found.gaucSkipped).toBeGreaterThan(0)
  })

  it('are what they must be in the limits', () => {
    const labels = [1, 0, 0, 1, 0]
    const ones = labels.map(() => 1)
    const constant = binaryMetrics(
      labels.map(() => Math.log(0.4 / 0.6)),
      labels,
      ones,
      ones,
    )
    expect(constant.ne).toBeCloseTo(1, 14)
    expect(constant.calibration).toBeCloseTo(1, 14)
    expect(constant.auc).toBe(0.5)
    expect(auc([1, 2], [0, 1])).toBe(1)
    expect(auc([1, 2], [1, 0])).toBe(0)
    expect(auc([1, 2], [1, 1])).toBeNaN()
    expect(groupedAuc([1, 1], [1, 2], [1, 1])).toEqual({ gauc: Number.NaN, sum: 0, groups: 0, skipped: 1 })
    expect(crossEntropy(-800, 1)).toBe(800)
    expect(crossEntropy(800, 1)).toBe(0)
    expect(() => auc([Number.NaN, 2], [1, 0])).toThrow(/NaN/)
  })

  it('stream: for life, over a window, and on from a state', () => {
    const { logits, labels, weights, requests } = sample(7000)
    const cut = (from: number, to: number) =>
      [logits, labels, weights, requests].map(x => x.slice(from, to)) as [number[], number[], number[], number[]]
    const whole = new StreamingMetrics(500)
    let resumed = new StreamingMetrics(500)
    for (let at = 0; at < 7000; at += 70) {
      whole.update(...cut(at, at + 70))
      resumed.update(...cut(at, at + 70))
      if (at % 490 === 0) {
        const state = JSON.parse(JSON.stringify(resumed.state()))
        resumed = new StreamingMetrics(500)
        resumed.setState(state)
      }
    }
    expect(resumed.lifetime()).toEqual(whole.lifetime())
    expect(resumed.windowed()).toEqual(whole.windowed())
    const all = binaryMetrics(logits, labels, weights, requests)
    const { aucError, ...lifetime } = whole.lifetime()
    for (const [name, value] of Object.entries(lifetime)) expect(value).toBeCloseTo(all[name as 'ne'], 9)
    expect(aucError).toBeGreaterThan(0) // the logits tie anyway, but bins do not know it
    const counted = weights.flatMap((w, i) => (w > 0 ? [i] : [])).slice(-500)
    const last = [logits, labels, weights, requests].map(x => counted.map(i => x[i]!)) as [
      number[],
      number[],
      number[],
      number[],
    ]
    for (const [name, value] of Object.entries(whole.windowed()))
      expect(value).toBeCloseTo(binaryMetrics(...last)[name as 'ne'], 12)
    expect(() => whole.update([Number.NaN], [1], [1], [0])).toThrow(/NaN/)
    expect(() => new StreamingMetrics(0)).toThrow(/window/)
  })
})

describe('online baselines', () => {
  const shown = (user: bigint, item: bigint, time = 0n) => ({ user, item, time })
  const learn = <M extends OnlineBaseline | FeatureGroup>(model: M, rows: [bigint, bigint, number, bigint?][]) => {
    for (const [user, item, label, time] of rows) model.update(shown(user, item, time), label)
    return model
  }
  const logit = (p: number) => Math.log(p / (1 - p))
  const rows: [bigint, bigint, number][] = [
    [1n, 5n, 1],
    [1n, 6n, 0],
    [2n, 5n, 1],
    [2n, 6n, 1],
  ]
  it('are the rates that they say', () => {
    const base = 4 / 6 // one positive of two, then three of four
    expect(learn(baseRate(), rows).predict(shown(1n, 5n))).toBeCloseTo(logit(base), 12)
    const item = (2 + 3 * base) / (2 + 3)
    expect(learn(itemPopularity(3), rows).predict(shown(9n, 5n))).toBeCloseTo(logit(item), 12)
    expect(learn(itemPopularity(3), rows).predict(shown(9n, 99n))).toBeCloseTo(logit(base), 12)
    const user = (1 + 2 * base) / (2 + 2)
    expect(learn(additiveLogit(2, 3), rows).predict(shown(1n, 5n))).toBeCloseTo(
      logit(user) + logit(item) - logit(base),
      12,
    )
  })
  it('logistic regression takes the steps of Adagrad', () => {
    const model = learn(logisticRegression({ lr: 0.5, l2: 0.1 }), [
      [1n, 5n, 1],
      [1n, 6n, 0],
    ])
    // First step: every weight moves by lr against the sign of its gradient.
    const sigmoid = (x: number) => 1 / (1 + Math.exp(-x))
    const [g0] = [sigmoid(0) - 1]
    const g1 = sigmoid(0.5 + 0.5) - 0
    const intercept = 0.5 - (0.5 * g1) / Math.sqrt(g0 * g0 + g1 * g1)
    const gu = g1 + 0.1 * 0.5
    const user = 0.5 - (0.5 * gu) / Math.sqrt(g0 * g0 + gu * gu)
    expect(model.predict(shown(1n, 5n))).toBeCloseTo(intercept + user + 0.5, 6)
    expect(model.predict(shown(1n, 6n))).toBeCloseTo(intercept + user - 0.5, 6)
  })
  it('give features that are what they say', () => {
    const log: [bigint, bigint, number, bigint][] = Array.from({ length: 200 }, (_, i) => [
      ...([BigInt(random.int(6)), BigInt(random.int(9)), random.int(2), BigInt(600 * i)] as const),
    ])
    // Item rates of strength 20 before each impression, and from them residuals.
    const seen = (i: number, of: (row: (typeof log)[number]) => boolean) => log.slice(0, i).filter(of)
    const positives = (rows: typeof log) => rows.reduce((sum, row) => sum + row[2], 0)
    const base = (i: number, strength: number) => (positives(log.slice(0, i)) + strength) / (i + 2 * strength)
    const rate = (i: number, of: (row: (typeof log)[number]) => boolean, strength: number) =>
      (positives(seen(i, of)) + strength * base(i, 1)) / (seen(i, of).length + strength)
    const residuals = log.map(([, item, label], i) => label - rate(i, row => row[1] === item, 20))
    const squares = (1 + residuals.reduce((sum, e) => sum + e * e, 0)) / (4 + log.length)
    const similarity = (a: bigint, b: bigint) => {
      let [sum, count] = [0, 0]
      log.forEach(([user, item], i) => {
        log.slice(0, i).forEach(([other, past], j) => {
          if (user !== other || !((item === a && past === b) || (item === b && past === a))) return
          sum += residuals[i]! * residuals[j]!
          count++
        })
      })
      return sum / (count + 3) / squares
    }
    const own = log.flatMap(([user, item], i) => (user === 2n && item !== 4n ? [i] : []))
    const weights = own.map(i => similarity(4n, log[i]![1]))
    const wanted = weights.reduce((sum, s, k) => sum + s * residuals[own[k]!]!, 0)
    const [feature] = learn(similarHistory({ shrink: 3, smooth: 0.5 }), log).of(shown(2n, 4n))
    expect(feature).toBeCloseTo(wanted / (0.5 + weights.reduce((sum, s) => sum + Math.abs(s), 0)), 12)
    expect(learn(similarHistory(), log).of(shown(99n, 4n))).toEqual([0])

    const all = base(200, 1)
    const of = (k: 0 | 1, id: bigint, strength: number) => logit(rate(200, row => row[k] === id, strength)) - logit(all)
    const means = learn(runningMeans(5, 7), log).of(shown(3n, 8n))
    expect(means[0]).toBeCloseTo(of(0, 3n, 5), 12)
    expect(means[1]).toBeCloseTo(of(1, 8n, 7), 12)

    let recent: number | null = null
    log.forEach(([user, , label], i) => {
      if (user === 3n) recent = 0.75 * (recent ?? base(i, 1)) + 0.25 * label
    })
    const [age, times, user] = learn(recency(0.25), log).of(shown(3n, 8n, 3_600_000n))
    const first = Number(log.find(row => row[1] === 8n)![3])
    expect(age).toBeCloseTo(Math.log(1 + (3_600_000 - first) / 3600), 12)
    expect(times).toBeCloseTo(Math.log(1 + log.filter(row => row[0] === 3n && row[1] === 8n).length), 12)
    expect(user).toBeCloseTo(logit(0.9 * recent! + 0.1 * all) - logit(all), 12)
    expect(recency().of(shown(1n, 1n))).toEqual([0, 0, 0])
  })
  it('learn what there is to learn, before they see the answer', async () => {
    const random = new Random('learn')
    const tastes = Array.from({ length: 30 }, () => 1.5 * random.normal())
    async function* batches() {
      for (let b = 0; b < 3000; b++) {
        const [user, item] = [random.int(30), random.int(20)]
        const like = Number(random.float() < 1 / (1 + Math.exp(-tastes[user]!)))
        yield {
          schema: { actions: ['LIKE'], values: [], contextual: [], series: [] },
          ...{
            requests: Int32Array.of(b),
            requestIds: [''],
            users: BigInt64Array.of(BigInt(user)),
            times: BigInt64Array.of(0n),
          },
          ...{ contextual: new BigInt64Array(0), historyStart: new Int32Array(1), supervisedFrom: new Int32Array(1) },
          history: {
            ...{
              offsets: new BigInt64Array(2),
              items: new BigInt64Array(0),
              series: new Uint8Array(0),
              times: new BigInt64Array(0),
            },
            ...{
              actions: new Int32Array(0),
              taken: new Int32Array(0),
              pending: new Int32Array(0),
              requests: new Int32Array(0),
              values: {},
            },
          },
          candidates: {
            ...{
              offsets: BigInt64Array.of(0n, 1n),
              items: BigInt64Array.of(BigInt(item)),
              requestIndex: new BigInt64Array(1),
            },
            ...{ actions: Int32Array.of(like), taken: new Int32Array(1), values: {} },
          },
        }
      }
    }
    const task = { name: 'like', kind: 'binary', actions: 1, value: null, atLeast: null, once: false } as const
    const report = await evaluateBaselines(batches(), [task], { from: 2000, gaucBy: 'user' })
    const ne = Object.fromEntries(report.map(({ baseline, metrics }) => [baseline, metrics.ne]))
    expect(report.every(({ metrics }) => metrics.weight === 1000)).toBe(true)
    expect(ne['running base rate']).toBeGreaterThan(0.99)
    expect(ne['smoothed item popularity']).toBeGreaterThan(0.97)
    expect(ne['additive logit of user and item rates']).toBeLessThan(0.88)
    expect(ne['logistic regression, ids']).toBeLessThan(0.88)
    expect(ne['logistic regression, ids + running means']).toBeLessThan(0.88)
  })
})
