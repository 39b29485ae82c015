import { deepStrictEqual, ok } from 'node:assert/strict'
import { native } from '#lib/native.js'
import { randomIds } from '#lib/ops/random_ids.js'
import { scope } from '#lib/tensor.js'
import { describeOp, itOp, throwsCode } from '../harness.js'

const mask32 = (1n << 32n) - 1n

/** Philox4x32-10 of Salmon et al., SC 2011, section 3.3, in big integers: a 128-bit counter and a 64-bit key. */
function philox(counter: bigint, key: bigint): bigint[] {
  let [x0, x1, x2, x3] = [0n, 32n, 64n, 96n].map(shift => (counter >> shift) & mask32) as [
    bigint,
    bigint,
    bigint,
    bigint,
  ]
  for (let round = 0n; round < 10n; round++) {
    const k0 = ((key & mask32) + round * 0x9e3779b9n) & mask32
    const k1 = ((key >> 32n) + round * 0xbb67ae85n) & mask32
    const a = 0xd2511f53n * x0
    const b = 0xcd9e8d57n * x2
    ;[x0, x1, x2, x3] = [(b >> 32n) ^ x1 ^ k0, b & mask32, (a >> 32n) ^ x3 ^ k1, a & mask32]
  }
  return [x0, x1, x2, x3]
}

function expected(count: number, low: bigint, high: bigint, seed: bigint, offset: bigint): BigInt64Array {
  return BigInt64Array.from({ length: count }, (_, n) => {
    const block = BigInt.asUintN(64, offset + BigInt(n >> 2))
    return low + ((philox(block, BigInt.asUintN(64, seed))[n & 3]! * (high - low)) >> 32n)
  })
}

type Case = { shape: number[]; low: number; high: number; seed: bigint; offset: bigint }

describeOp<Case>('random_ids', {
  cases: [
    { name: 'none', shape: [0, 4], low: 1, high: 9, seed: 1n, offset: 0n },
    { name: 'scalar', shape: [], low: 1, high: 1000, seed: 1n, offset: 3n },
    { name: 'one id possible', shape: [5], low: 7, high: 8, seed: 1n, offset: 0n },
    { name: 'not a multiple of four', shape: [7, 3], low: 1, high: 1683, seed: 42n, offset: 11n },
    { name: 'negative ids', shape: [33], low: -50, high: -10, seed: -1n, offset: 0n },
    { name: 'past one task', shape: [4099, 5], low: 0, high: 2 ** 32 - 1, seed: 2n ** 62n + 12345n, offset: 2n ** 40n },
  ],
  inputs: () => ({}),
  run: (_, { shape, ...options }) => randomIds(shape, options),
  reference: (_, { shape, low, high, seed, offset }) => {
    const count = shape.reduce((p, q) => p * q, 1)
    return [Array.from(expected(count, BigInt(low), BigInt(high), seed, offset), Number)]
  },
  tolerance: { float32: 0, float64: 0 },
})

itOp('random_ids', 'the reference gives the known answers of the Random123 distribution', () => {
  const hex = (words: bigint[]) => words.map(word => word.toString(16).padStart(8, '0'))
  deepStrictEqual(hex(philox(0n, 0n)), ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8'])
  const ones = (bits: bigint) => (1n << bits) - 1n
  deepStrictEqual(hex(philox(ones(128n), ones(64n))), ['408f276d', '41c83b0e', 'a20bc7c6', '6d5451fd'])
  const counter = (0x03707344n << 96n) | (0x13198a2en << 64n) | (0x85a308d3n << 32n) | 0x243f6a88n
  deepStrictEqual(hex(philox(counter, (0x299f31d0n << 32n) | 0xa4093822n)), [
    'd16cfe09',
    '94fdcceb',
    '5001e420',
    '24126ea1',
  ])
})
itOp('random_ids', 'ids beyond 2^53 and a counter that wraps around', () => {
  const low = 2n ** 62n + 1n
  const options = { low, high: low + 3706n, seed: 5n, offset: -2n }
  deepStrictEqual(randomIds([300], options).dataSync(), expected(300, low, low + 3706n, 5n, -2n))
})
itOp('random_ids', 'a draw goes on where another ended, whatever the number of threads', () => {
  const options = { low: 1, high: 3706, seed: 9n }
  const all = randomIds([50000], { ...options, offset: 10n }).dataSync()
  const rest = randomIds([50000 - 16400], { ...options, offset: 10n + 4100n }).dataSync()
  deepStrictEqual(rest, all.slice(16400))
  for (const threads of [1, 2, 3]) {
    native.set_num_threads(threads)
    try {
      deepStrictEqual(
        scope(() => randomIds([50000], { ...options, offset: 10n }).dataSync()),
        all,
      )
    } finally {
      native.set_num_threads(0)
    }
  }
})
itOp('random_ids', 'is uniform', () => {
  const counts = new Float64Array(100)
  for (const id of randomIds([200000], { low: 0, high: 100, seed: 3n }).dataSync()) counts[Number(id)]! += 1
  const chiSquare = counts.reduce((total, count) => total + (count - 2000) ** 2 / 2000, 0)
  ok(chiSquare > 50 && chiSquare < 160, `chi-square ${chiSquare} with 99 degrees of freedom`)
})
itOp('random_ids', 'refuses an impossible range', () => {
  const at = (low: number | bigint, high: number | bigint) => randomIds([2], { low, high, seed: 0n })
  throwsCode(() => at(5, 5), 'ERR_HSTU_INVALID_ARGUMENT', /high - low must be at least 1 .* got 5 - 5/)
  throwsCode(() => at(0, 2 ** 32), 'ERR_HSTU_INVALID_ARGUMENT', /below 2\^32/)
  throwsCode(() => at(0.5, 2), 'ERR_HSTU_INVALID_ARGUMENT', /low must be an integer, got 0.5/)
})
