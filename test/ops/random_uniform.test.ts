import { deepStrictEqual, ok } from 'node:assert/strict'
import { randomUniform } from '#lib/ops/random_uniform.js'
import { type Device, type Dtype, scope } from '#lib/tensor.js'
import { describeOp, itOp, normal, philoxWord, sameBits, throwsCode } from '../harness.js'

interface Case {
  shape: number[]
  bound: number
  seed: bigint
  offset?: bigint
}

describeOp<Case>('random_uniform', {
  cases: [
    { name: 'nothing', shape: [0, 4], bound: 1, seed: 1n },
    { name: 'one', shape: [1], bound: 1, seed: 1n },
    { name: 'part of a block', shape: [7], bound: 0.02, seed: -3n },
    { name: 'far into the stream', shape: [3, 5], bound: 5, seed: 2n ** 63n - 1n, offset: 2n ** 40n + 3n },
    { name: 'blocks side by side, and some more', shape: [1027], bound: 0.1, seed: 99n, offset: 5n },
    { name: 'more than a task', shape: [20_000], bound: 1e-3, seed: 7n },
  ],
  // The dtype and the device under test are those of an input.
  inputs: (_, random) => ({ like: normal(random, [1]) }),
  run: (t, { shape, ...c }) => randomUniform(shape, { ...c, dtype: t.like!.dtype, device: t.like!.device }),
  reference: (x, { shape, bound, seed, offset = 0n }) => {
    const single = !Object.is(Math.fround(x.like![0]!), x.like![0]!) ? (v: number) => v : Math.fround
    const scale = single(bound) * 2 ** -23
    const size = shape.reduce((a, b) => a * b, 1)
    return [Array.from({ length: size }, (_, n) => single(scale * ((philoxWord(seed, offset, n) | 0) >> 8)))]
  },
  tolerance: { float32: 0, float64: 0 },
})

itOp('random_uniform', 'fills -bound .. bound evenly', () =>
  scope(() => {
    const x = randomUniform([100_000], { bound: 2, seed: 4n }).dataSync() as Float32Array
    const parts = new Array(8).fill(0)
    for (const value of x) parts[Math.floor((value + 2) * 2)]++
    deepStrictEqual(
      parts.reduce((a, b) => a + b),
      100_000,
    )
    for (const part of parts) ok(Math.abs(part - 12_500) < 5 * Math.sqrt(12_500), `a part of an eighth has ${part}`)
  }),
)

itOp('random_uniform', 'a draw goes on where the one before ended, with any number of threads', () =>
  sameBits(() => {
    const whole = randomUniform([40_000], { bound: 1, seed: 8n })
    const parts = [0n, 5_000n].map(offset => randomUniform([20_000], { bound: 1, seed: 8n, offset }))
    deepStrictEqual(whole.rows(0, 20_000).dataSync(), parts[0]!.dataSync())
    deepStrictEqual(whole.rows(20_000, 40_000).dataSync(), parts[1]!.dataSync())
    return whole
  }),
)

itOp(
  'random_uniform',
  'the same bits as on the CPU',
  () =>
    scope(() => {
      const draw = (device: Device) =>
        randomUniform([33_333], { bound: 0.037, seed: -5n, offset: 9n, device }).dataSync()
      deepStrictEqual(draw('cuda'), draw('cpu'))
    }),
  'cuda',
)

itOp('random_uniform', 'names what is wrong', () => {
  const at = (bound: number, dtype: Dtype = 'float32') => randomUniform([2], { bound, seed: 1n, dtype })
  const code = 'ERR_HSTU_INVALID_ARGUMENT'
  for (const bound of [0, -1, Number.NaN, Number.POSITIVE_INFINITY]) throwsCode(() => at(bound), code, /bound must be/)
  throwsCode(() => at(1, 'int64'), 'ERR_HSTU_DTYPE', /float dtype/)
})
