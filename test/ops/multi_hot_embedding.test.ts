import { ok } from 'node:assert/strict'
import { reshape, valueAndGrad } from '#lib/autograd.js'
import { native } from '#lib/native.js'
import { mseLoss } from '#lib/ops/mse_loss.js'
import { multiHotEmbedding } from '#lib/ops/multi_hot_embedding.js'
import { Random } from '#lib/random.js'
import { scope, Tensor } from '#lib/tensor.js'
import { assertClose, describeOp, int64, itOp, normal, sameBits, throwsCode, valuesOf } from '../harness.js'

interface Case {
  K: number
  d: number
  T: number
  pending?: boolean
  /** All actions are this one. */
  action?: bigint
}

describeOp<Case>('multi_hot_embedding', {
  cases: [
    { name: 'no actions', K: 3, d: 4, T: 0 },
    { name: 'no features', K: 0, d: 4, T: 3 },
    { name: 'one bit', K: 1, d: 1, T: 5 },
    { name: 'an action encoder', K: 5, d: 8, T: 40 },
    { name: 'an odd width', K: 3, d: 5, T: 33 },
    { name: 'two columns', K: 7, d: 2, T: 9 },
    { name: 'some pending', K: 4, d: 8, T: 70, pending: true },
    { name: 'all pending', K: 2, d: 3, T: 9, pending: true, action: -1n },
    { name: 'the smallest action is pending', K: 2, d: 3, T: 2, pending: true, action: -(2n ** 63n) },
    { name: 'no bits', K: 3, d: 4, T: 6, action: 0n },
    { name: 'every bit of 63', K: 63, d: 2, T: 3, action: 2n ** 63n - 1n },
    { name: 'past a block of rows', K: 3, d: 4, T: 1025, pending: true },
    { name: 'many blocks of rows', K: 2, d: 33, T: 5000, pending: true },
  ],
  inputs: ({ K, d, T, pending, action }, random) => {
    const one = () => {
      if (pending && random.int(3) === 0) return BigInt(-1 - random.int(5))
      return Array.from({ length: K }, (_, k) => (random.int(2) ? 1n << BigInt(k) : 0n)).reduce((a, b) => a | b, 0n)
    }
    return {
      table: normal(random, [K, d]),
      actions: int64(Array.from({ length: T }, () => action ?? one())),
      pending: pending ? normal(random, [K, d]) : null,
    }
  },
  run: t => multiHotEmbedding(t.table!, t.actions!, { pending: t.pending ?? null }),
  reference: (x, { K, d, action }) => {
    // Numbers hold 53 bits: the cases beyond them have one action.
    const set = (a: number, k: number) => ((action ?? BigInt(a)) / 2n ** BigInt(k)) % 2n === 1n
    return [
      Array.from(x.actions!).flatMap(a =>
        Array.from({ length: K * d }, (_, c) => {
          if (a < 0) return x.pending![c]!
          return set(a, Math.floor(c / d)) ? x.table![c]! : 0
        }),
      ),
    ]
  },
  gradients: ['table', 'pending'],
  tolerance: { float32: 1e-6, float64: 1e-14 },
})

itOp('multi_hot_embedding', 'the gradient has the same bits with any number of threads', () =>
  sameBits(() => {
    const [T, K, d] = [10_000, 3, 5]
    const random = new Random(2)
    const dy = Tensor.from(
      Float32Array.from({ length: T * K * d }, () => random.normal()),
      [T, K * d],
    )
    const actions = Tensor.from(BigInt64Array.from({ length: T }, () => BigInt(random.int(9) - 1)))
    const grads = [Tensor.empty([K, d]), Tensor.empty([K, d])]
    native.multi_hot_embedding_backward(grads[0]!, grads[1]!, dy, actions)
    return grads
  }),
)

itOp('multi_hot_embedding', 'a pending row that is no parameter gets no gradient, and gives none', () =>
  scope(() => {
    const [table, pending] = [Tensor.from([1, 2], [2, 1]), Tensor.from([5, 6], [2, 1])]
    const actions = Tensor.from(BigInt64Array.of(3n, -1n, 1n))
    const { value, grads } = valueAndGrad([table], () => {
      const y = multiHotEmbedding(table, actions, { pending })
      return mseLoss(reshape(y, [6]), Tensor.zeros([6]))
    })
    ok(Math.abs(value.item() - (1 + 4 + 25 + 36 + 1) / 6) < 1e-5)
    assertClose(valuesOf(grads[0]!), [4 / 6, 4 / 6], 1e-6, 'dtable')
  }),
)

itOp('multi_hot_embedding', 'names the action', () => {
  const table = Tensor.zeros([3, 2])
  const at = (...actions: bigint[]) => multiHotEmbedding(table, Tensor.from(BigInt64Array.from(actions)))
  const code = 'ERR_HSTU_INVALID_ARGUMENT'
  throwsCode(() => at(7n, 8n), code, /actions\[1\] = 8 has a bit at or above the table's 3 rows/)
  throwsCode(() => at(0n, 1n, -4n), code, /actions\[2\] = -4 is negative \(not known\), but there is no pending row/)
  throwsCode(() => multiHotEmbedding(table, Tensor.zeros([2])), 'ERR_HSTU_DTYPE', /actions must be int64/)
  const wide = () => multiHotEmbedding(Tensor.zeros([64, 1]), Tensor.zeros([1], { dtype: 'int64' }))
  throwsCode(wide, code, /table has 64 rows, an action has at most 63 bits/)
  const pending = () => multiHotEmbedding(table, Tensor.zeros([1], { dtype: 'int64' }), { pending: Tensor.zeros([6]) })
  throwsCode(pending, 'ERR_HSTU_SHAPE', /pending must have shape \[K=3, d=2\]/)
  table.dispose()
})
