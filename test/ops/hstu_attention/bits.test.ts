// HSTU attention, bit for bit: a row does not depend on what is beside it, on pages, chunks or threads.
import { ok } from 'node:assert/strict'
import { native } from '#lib/native.js'
import { Random } from '#lib/random.js'
import { scope } from '#lib/tensor.js'
import { itOp, rounded } from '../../harness.js'
import { type Choice, plain, problemOf } from './cases.js'
import type { Problem, Table } from './oracle.js'
import { equalBits, everywhere, forward, range, run, single } from './run.js'

const bases: [string, Partial<Choice>][] = [
  ['silu', { pos: 'shared', time: 'shared', H: 2, rowScales: true, D: 50, V: 50 }],
  [
    'silu with a window',
    { pos: 'per head', time: 'shared', H: 2, W: 64, contextual: 'some', rowScales: true, D: 25, V: 32 },
  ],
  ['silu with a window and full rows', { pos: 'shared', W: 7, F: 5, contextual: 'one', rowScales: true, D: 64, V: 25 }],
  ['softmax', { softmax: true, pos: 'shared', time: 'per head', H: 2, W: 64, contextual: 'some', rowScales: true }],
]

function take(p: Problem, name: 'q' | 'k' | 'v', rows: readonly number[]): Float64Array {
  const width = p.H * (name === 'v' ? p.V : p.D)
  return Float64Array.from(rows.flatMap(row => [...p[name].subarray(row * width, (row + 1) * width)]))
}

/** The problem of one sequence with the keys `keys` and the query rows `rows` (rows of the original). */
function select(p: Problem, keys: readonly number[], rows: readonly number[], targets: number): Problem {
  const times = (from: BigInt64Array, at: readonly number[]) => BigInt64Array.from(at.map(i => from[i]!))
  return {
    ...p,
    lengths: [keys.length],
    queries: [rows.length],
    targets: [targets],
    q: take(p, 'q', rows),
    k: take(p, 'k', keys),
    v: take(p, 'v', keys),
    scales: Float64Array.from(rows.map(i => p.scales[i]!)),
    queryTime: times(p.queryTime, rows),
    keyTime: times(p.keyTime, keys),
  }
}

function equalRows(
  p: Problem,
  a: ArrayLike<number>,
  rowA: number,
  b: ArrayLike<number>,
  rowB: number,
  what: string,
): void {
  const width = p.H * p.V
  for (let x = 0; x < width; x++)
    ok(Object.is(a[rowA * width + x], b[rowB * width + x]), `${what}: row ${rowB} differs at ${x}`)
}

for (const [name, base] of bases) {
  const make = (c: Partial<Choice>, lengths: number[]) =>
    problemOf({ ...plain, P: 40, NB: 40, ...base, ...c, dtype: 'float32' }, lengths, new Random(`bits ${name}`))

  everywhere(`${name}: targets permuted or taken in chunks`, () => {
    for (const g of [1, 2, 5] as const) {
      const [h, K] = [131, 60]
      const p = { ...make({ g }, [h + K]), targets: [K] }
      const whole = forward(p)
      const groups = new Random(3).shuffle(range(0, K / g))
      const order = groups.flatMap(group => range(h + group * g, h + group * g + g))
      const all = [...range(0, h), ...order]
      const permuted = forward(select(p, all, all, K))
      all.forEach((row, at) => {
        equalRows(p, permuted, at, whole, row, `g=${g} permuted`)
      })
      for (const chunk of [order.slice(0, g), order.slice(g, 7 * g)]) {
        const some = forward(select(p, [...range(0, h), ...chunk], chunk, chunk.length))
        chunk.forEach((row, at) => {
          equalRows(p, some, at, whole, row, `g=${g} chunk`)
        })
      }
    }
  })

  everywhere(`${name}: queries in chunks, each with the keys up to its end`, () => {
    const p = make({}, [300])
    if (p.F > 0) return // the last F rows change with the length
    const whole = forward(p)
    for (const [begin, end] of [
      [0, 1],
      [0, 33],
      [33, 34],
      [40, 200],
      [200, 300],
      [299, 300],
    ] as const) {
      const chunk = forward(select(p, range(0, end), range(begin, end), 0))
      for (let i = begin; i < end; i++) equalRows(p, chunk, i - begin, whole, i, `rows ${begin} to ${end}`)
    }
  })

  everywhere(`${name}: batch-mates, also full of NaN`, () => {
    const p = { ...make({}, [70, 0, 257, 19]), contextual: [4, 4, 4, 4], targets: [5, 0, 40, 0] }
    const whole = forward(p)
    let row = 0
    p.lengths.forEach((L, b) => {
      const rows = range(row, row + L)
      const alone = forward({ ...select(p, rows, rows, p.targets[b]!), contextual: [4] })
      rows.forEach((i, at) => {
        equalRows(p, alone, at, whole, i, `sequence ${b} alone`)
      })
      row += L
    })
    const poisoned = { ...p, q: p.q.slice(), k: p.k.slice(), v: p.v.slice() }
    poisoned.q.fill(Number.NaN, 70 * p.H * p.D, 327 * p.H * p.D)
    poisoned.k.fill(Number.NaN, 70 * p.H * p.D, 327 * p.H * p.D)
    poisoned.v.fill(Number.NaN, 70 * p.H * p.V, 327 * p.H * p.V)
    const near = forward(poisoned)
    for (const i of [...range(0, 70), ...range(327, 346)]) equalRows(p, near, i, whole, i, 'beside NaN')
    ok(Number.isNaN(near[200 * p.H * p.V]), 'NaN in its own sequence')
  })

  everywhere(`${name}: float32 tables beside q, k, v of any dtype`, () => {
    const p = { ...make({}, [70, 0, 257]), targets: [5, 0, 40] }
    const dout = Float64Array.from({ length: (p.q.length / p.D) * p.V }, (_, i) => Math.sin(i))
    const { dtype } = single()
    const table = (from: Table | null) => from && { ...from, data: rounded(from.data, dtype) }
    const exact = { ...p, pos: table(p.pos), time: table(p.time) }
    const [narrow, wide] = ([dtype, 'float32'] as const).map(tables =>
      scope(() => run(exact, { ...single(), tables }, dout)),
    ) as [ReturnType<typeof run>, ReturnType<typeof run>]
    equalBits(wide.out, narrow.out, 'out')
    for (const i of [0, 1, 2]) equalBits(wide.grads[i]!, narrow.grads[i]!, `gradient ${i}`)
  })

  everywhere(`${name}: paged or jagged`, () => {
    for (const delta of [0, 8] as const) {
      const p = { ...make({ delta }, [70, 0, 257, 128]), targets: [5, 0, 40, 8] }
      const jagged = forward(p)
      for (const pageSize of [16, 64, 128, 100]) {
        equalBits(forward(p, { ...single(), pageSize, random: new Random(pageSize) }), jagged, `pages of ${pageSize}`)
      }
    }
  })

  itOp('hstu_attention', `${name}: any number of threads, and again`, () => {
    const p = { ...make({}, [70, 0, 257, 128, 600]), targets: [5, 0, 40, 8, 0] }
    const dout = Float64Array.from({ length: (p.q.length / p.D) * p.V }, (_, i) => Math.sin(i))
    const results = [1, 2, 3, 3].map(threads => {
      native.set_num_threads(threads)
      return scope(() => run(p, single(), dout))
    })
    native.set_num_threads(0)
    for (const { out, grads } of results.slice(1)) {
      equalBits(out, results[0]!.out, 'out')
      grads.forEach((gradient, i) => {
        equalBits(gradient, results[0]!.grads[i]!, `gradient ${i}`)
      })
    }
  })
}
