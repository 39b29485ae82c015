import { candidatePairs, TargetAttention } from '#lib/layers/target_attention.js'
import { Din, type DinConfig } from '#lib/models/din.js'
import { Philox } from '#lib/philox.js'
import { Random } from '#lib/random.js'
import { memory, scope, Tensor } from '#lib/tensor.js'
import { layerNorm, type Matrix, map, matrix, plus, plusRow, times } from './naive.js'

const config: DinConfig = { users: 4, items: 9, actions: 3, tasks: 2, dim: 5, hidden: 6, scale: 0.25, dropout: 0.5 }
const int64 = (values: number[]) => Tensor.from(BigInt64Array.from(values, BigInt))
const rowsOf = (x: Tensor): Matrix => matrix(Float64Array.from(x.dataSync() as Float64Array), x.shape[1]!)

it('is its equations around target attention', () => {
  const before = memory()
  scope(() => {
    const model = new Din(config, 3, { dtype: 'float64' })
    const random = new Random(1)
    for (const x of Object.values(model.parameters))
      x.write(Float64Array.from({ length: x.size }, () => 0.5 * random.normal()))
    const [candidates, users] = [
      [3, 0, 7, 9],
      [1, 1, 1, 4],
    ]
    const [history, actions] = [
      [2, 9, 5],
      [5, 0, 2],
    ]
    const offsets = (...ends: bigint[]) => BigInt64Array.from([0n, ...ends])
    const pairs = candidatePairs(offsets(3n, 3n), offsets(3n, 4n))
    const inputs = {
      ...{
        candidates: int64(candidates),
        users: int64(users),
        history: int64(history),
        actions: int64(actions),
        pairs,
      },
    }
    const logits = model.forward(inputs)
    const p = Object.fromEntries(Object.entries(model.parameters).map(([name, x]) => [name, x]))
    const at = (name: string) => rowsOf(p[name]!)
    const vector = (name: string) => Array.from(p[name]!.dataSync(), Number)
    const pick = (name: string, ids: number[]) => ids.map(id => at(name)[id]!)
    const q = pick('items', candidates)
    const bits = actions.map(mask => at('actions').flatMap((row, k) => row.map(x => (mask & (1 << k) ? x : 0))))
    const k = plus(pick('items', history), times(bits, at('action')))
    const attention = new TargetAttention({ dim: 5, scale: 0.25 }, random, { dtype: 'float64' })
    for (const [name, x] of Object.entries(attention.parameters)) x.write(p[`attention.${name}`]!.dataSync())
    const tensor = (rows: Matrix) => Tensor.from(Float64Array.from(rows.flat()), [rows.length, 5])
    const s = rowsOf(attention.forward(tensor(q), tensor(k), pairs))
    expect(s[3]).toEqual([0, 0, 0, 0, 0]) // its request has no history
    const product = q.map((row, m) => row.map((x, i) => x * s[m]![i]!))
    const parts = [times(s, at('head.hidden')), times(q, at('query')), times(product, at('product'))]
    const z = plusRow([...parts, times(pick('users', users), at('user'))].reduce(plus), vector('head.hiddenBias'))
    const gate = map(
      layerNorm(z, 1e-5, vector('head.swishWeight'), vector('head.swishBias')),
      x => 1 / (1 + Math.exp(-x)),
    )
    const gated = z.map((row, m) => row.map((x, i) => x * gate[m]![i]!))
    const expected = plusRow(times(gated, at('head.output')), vector('head.outputBias'))
    rowsOf(logits).forEach((row, m) => {
      row.forEach((x, task) => {
        expect(x).toBeCloseTo(expected[m]![task]!, 4) // both norms' eps
      })
    })
    const noisy = model.forward(inputs, new Philox(7n))
    expect([...noisy.dataSync()]).not.toEqual([...logits.dataSync()])
    for (const x of Object.values(attention.parameters)) x.dispose()
    model.dispose()
  })
  expect(memory()).toEqual(before)
})

it('names what is wrong', () => {
  const bad = { ...config, dim: 0 }
  expect(() => new Din(bad)).toThrow(
    expect.objectContaining({ code: 'ERR_HSTU_INVALID_ARGUMENT', message: expect.stringMatching(/dim .* got 0/) }),
  )
})
