// Cases of HSTU attention: levels of what may vary, draws that cover pairs of them, and the problem of a draw.
import { Random } from '#lib/random.js'
import { rounded, sum } from '../../harness.js'
import type { Problem, Table } from './oracle.js'
import type { FloatName } from './run.js'

export const levels = {
  D: [16, 25, 32, 50, 64, 128, 256],
  V: [16, 25, 32, 50, 64, 128, 256],
  H: [1, 2, 4],
  contextual: ['none', 'one', 'some', 'mixed', 'more than h'],
  targets: ['none', 'one', 'some', 'mixed', 'all'],
  W: [0, 1, 7, 64, 200],
  F: [0, 5],
  g: [1, 2, 5],
  causal: [true, true, false],
  full: [false, true],
  pos: ['none', 'shared', 'per head'],
  time: ['none', 'shared', 'per head'],
  P: [1, 40, 300],
  NB: [0, 5, 40, 128, 200],
  times: ['sorted', 'sorted', 'equal', 'unsorted', 'far'],
  size: [1, 10],
  rowScales: [false, true],
  delta: [0, 0, 1, 8, 160],
  pageSize: [0, 0, 0, 64, 128],
  softmax: [false, false, true],
  dropout: [0, 0, 0.3],
  alpha: ['one', 'root'],
  dtype: ['float32', 'float32', 'float32', 'float64'],
} as const
export type Choice = Omit<{ -readonly [K in keyof typeof levels]: (typeof levels)[K][number] }, 'dtype'> & {
  dtype: FloatName
}

export const names = Object.keys(levels) as (keyof Choice)[]
export const pick = <T>(random: Random, values: readonly T[]): T => values[random.int(values.length)]!

/** Cases in a fixed order; each is the best of eight draws at covering pairs of levels not yet covered. */
export function* cover(count: number): Generator<Choice> {
  const random = new Random('hstu_attention cover')
  const covered = new Set<string>()
  const pairs = (choice: Choice) =>
    names.flatMap((a, i) => names.slice(i + 1).map(b => `${a}=${choice[a]},${b}=${choice[b]}`))
  for (let n = 0; n < count; n++) {
    let best: Choice | undefined
    let most = -1
    for (let draw = 0; draw < 8; draw++) {
      const choice = Object.fromEntries(
        names.map(name => [name, pick(random, levels[name] as readonly unknown[])]),
      ) as Choice
      const fresh = pairs(choice).filter(pair => !covered.has(pair)).length
      if (fresh > most) [best, most] = [choice, fresh]
    }
    for (const pair of pairs(best!)) covered.add(pair)
    yield best!
  }
}

export function timesOf(kind: Choice['times'], length: number, random: Random): bigint[] {
  if (kind === 'equal') return Array<bigint>(length).fill(1_700_000_000n)
  if (kind === 'far') return Array.from({ length }, () => BigInt(random.int(2 ** 31)) << BigInt(random.int(31)))
  const times = Array.from({ length }, () => 1_600_000_000n + BigInt(Math.floor(Math.exp(random.float() * 18))))
  return kind === 'sorted' ? times.sort((a, b) => (a < b ? -1 : a > b ? 1 : 0)) : times
}

export function problemOf(c: Choice, lengths: number[], random: Random): Problem {
  const { D, V, H } = c
  const targets = lengths.map((L, b) => {
    const some = { none: 0, one: 1, some: 7, mixed: [0, 3, 40][b % 3]!, all: L }[c.targets]
    return Math.min(L, some)
  })
  const contextual = lengths.map((L, b) => {
    return { none: 0, one: 1, some: 4, mixed: b % 4, 'more than h': L - targets[b]! + 2 }[c.contextual]
  })
  const queries = lengths.map(L => (c.delta ? Math.min(L, c.delta) : L))
  const [Tk, Tq] = [sum(lengths), sum(queries)]
  const values = (n: number, scale: number) => {
    return rounded(
      Float64Array.from({ length: n }, () => scale * random.normal()),
      c.dtype,
    )
  }
  const alpha = c.alpha === 'one' ? 1 : 1 / Math.sqrt(D)
  const spread = Math.sqrt(c.size / (alpha * Math.sqrt(D)))
  const table = (kind: Choice['pos'], cols: number): Table | null => {
    if (kind === 'none') return null
    const rows = kind === 'shared' ? 1 : H
    return { rows, cols, data: values(rows * cols, 0.5) }
  }
  const keyTime = BigInt64Array.from(lengths.flatMap(L => timesOf(c.times, L, random)))
  const queryTime = new BigInt64Array(Tq)
  let [key, query] = [0, 0]
  lengths.forEach((L, b) => {
    // Retrieval's query times: the next key's; the last row's is the request's.
    for (let i = L - queries[b]!; i < L; i++)
      queryTime[query++] = keyTime[key + Math.min(i + 1, L - 1)]! + (i + 1 === L ? 77n : 0n)
    key += L
  })
  const constant = Math.fround(1 / 256)
  return {
    H,
    D,
    V,
    lengths,
    queries,
    targets,
    contextual,
    W: c.W,
    F: c.F,
    g: c.g,
    causal: c.causal,
    full: c.full,
    alpha,
    scales: Float64Array.from({ length: Tq }, () => (c.rowScales ? Math.fround(0.01 + random.float()) : constant)),
    softmax: c.softmax,
    dropout: c.softmax ? c.dropout : 0,
    seed: 0x1234_5678_9abcn,
    offset: 1n << 33n,
    N: Math.max(0, ...lengths) + random.int(3),
    q: values(Tq * H * D, spread),
    k: values(Tk * H * D, spread),
    v: values(Tk * H * V, 1),
    pos: table(c.pos, c.P),
    time: table(c.time, c.NB + 1),
    queryTime,
    keyTime,
  }
}

export const plain: Choice = {
  ...(Object.fromEntries(names.map(name => [name, levels[name][0]])) as Choice),
  D: 16,
  V: 25,
}
