import { deepStrictEqual } from 'node:assert/strict'
import { cumsum } from '#lib/ops/cumsum.js'
import { Tensor } from '#lib/tensor.js'
import { describeOp, int32, int64, itOp, throwsCode } from '../harness.js'

describeOp<{ lengths: number[]; make: typeof int32 | typeof int64 }>('cumsum', {
  cases: [
    { name: 'none', lengths: [], make: int64 },
    { name: 'one', lengths: [5], make: int64 },
    { name: 'int32', lengths: [3, 0, 2 ** 31 - 1, 2 ** 31 - 1, 1], make: int32 },
    { name: 'int64', lengths: [0, 0, 7, 1, 2 ** 40], make: int64 },
  ],
  inputs: ({ lengths, make }) => ({ lengths: make(lengths) }),
  run: t => cumsum(t.lengths!),
  reference: (_, { lengths }) => [[0, ...lengths.map((_, b) => lengths.slice(0, b + 1).reduce((p, q) => p + q))]],
  tolerance: { float32: 0, float64: 0 },
})

itOp('cumsum', 'is exact beyond 2^53', () => {
  const offsets = cumsum(Tensor.from(BigInt64Array.of(2n ** 53n, 1n, 1n)))
  deepStrictEqual(offsets.dataSync(), BigInt64Array.of(0n, 2n ** 53n, 2n ** 53n + 1n, 2n ** 53n + 2n))
})
itOp('cumsum', 'names a wrong length', () => {
  throwsCode(
    () => cumsum(Tensor.from(Int32Array.of(3, -1))),
    'ERR_HSTU_INVALID_ARGUMENT',
    /lengths\[1\] = -1 is negative/,
  )
  const huge = BigInt64Array.of(2n ** 62n, 2n ** 62n)
  throwsCode(() => cumsum(Tensor.from(huge)), 'ERR_HSTU_INVALID_ARGUMENT', /passes 2\^63 at lengths\[1\]/)
  throwsCode(() => cumsum(Tensor.zeros([2])), 'ERR_HSTU_DTYPE', /lengths must be int64/)
  throwsCode(() => cumsum(Tensor.zeros([2, 2], { dtype: 'int64' })), 'ERR_HSTU_SHAPE', /lengths must have shape \[B\]/)
})
