import { deepStrictEqual, ok, strictEqual } from 'node:assert/strict'
import { dropout } from '#lib/ops/dropout.js'
import { scope, Tensor } from '#lib/tensor.js'
import { describeOp, int64, itOp, normal, sameBits, throwsCode, valuesOf } from '../harness.js'

/** Philox4x32-10 from the paper: counter and key as 32-bit words, little end first. */
function philox(counter: readonly number[], key: readonly number[]): number[] {
  const mask = 0xffffffffn
  let [c0, c1, c2, c3] = counter.map(BigInt) as [bigint, bigint, bigint, bigint]
  let [k0, k1] = key.map(BigInt) as [bigint, bigint]
  for (let round = 0; round < 10; round++) {
    const [p0, p1] = [0xd2511f53n * c0, 0xcd9e8d57n * c2]
    ;[c0, c1, c2, c3] = [(p1 >> 32n) ^ c1 ^ k0, p1 & mask, (p0 >> 32n) ^ c3 ^ k1, p0 & mask]
    k0 = (k0 + 0x9e3779b9n) & mask
    k1 = (k1 + 0xbb67ae85n) & mask
  }
  return [c0, c1, c2, c3].map(Number)
}

const halves = (x: bigint) => [Number(x & 0xffffffffn), Number((x >> 32n) & 0xffffffffn)]

/** The first n words of the draw at (seed, offset). */
function draw(n: number, seed: bigint, offset: bigint): number[] {
  const words: number[] = []
  for (let block = 0n; words.length < n; block++)
    words.push(...philox([...halves(BigInt.asUintN(64, offset + block)), 0, 0], halves(BigInt.asUintN(64, seed))))
  return words.slice(0, n)
}

interface Case {
  shape: readonly number[]
  p: number
  seed: bigint
  offset: bigint
  /** Part of the offset that a tensor holds. */
  base?: bigint
}

describeOp<Case>('dropout', {
  cases: [
    { name: 'empty', shape: [0, 3], p: 0.5, seed: 1n, offset: 0n },
    { name: 'one', shape: [1], p: 0.5, seed: 1n, offset: 0n },
    { name: 'a block less one', shape: [3], p: 0.3, seed: 2n, offset: 5n },
    { name: 'a block and one', shape: [5], p: 0.3, seed: 3n, offset: 6n },
    { name: 'a group less one', shape: [31], p: 0.2, seed: -1n, offset: 7n },
    { name: 'a group and one', shape: [33], p: 0.8, seed: 4n, offset: -3n },
    { name: 'buffers', shape: [9, 125], p: 0.5, seed: 0x0123456789abcdefn, offset: 8n },
    { name: 'counter passes 2^32', shape: [321], p: 0.5, seed: 5n, offset: 0xffffffe9n },
    { name: 'counter wraps at 2^64', shape: [65], p: 0.5, seed: 6n, offset: -5n },
    { name: 'past one task', shape: [3, 5477], p: 0.1, seed: 7n, offset: 99n },
    { name: 'p 0', shape: [7], p: 0, seed: 8n, offset: 0n },
    { name: 'p near 1', shape: [4096], p: 0.999, seed: 9n, offset: 0n },
    { name: 'offset on the device', shape: [9, 125], p: 0.5, seed: 10n, offset: 8n, base: 2n ** 40n },
  ],
  inputs: ({ shape, base }, random) => ({ x: normal(random, shape), base: base === undefined ? null : int64([base]) }),
  run: (t, { p, seed, offset, base = 0n }) => {
    return dropout(t.x!, p, { seed, offset: offset - base, base: t.base ?? null })
  },
  reference: (x, { p, seed, offset }) => {
    const words = draw(x.x!.length, seed, offset)
    return [x.x!.map((value, i) => (words[i]! >= Math.floor(p * 2 ** 32) ? value / (1 - p) : 0))]
  },
  gradients: ['x'],
})

itOp('dropout', 'known answers of Random123: the word itself, found by thresholds around it', () => {
  const ones = 0xffffffff
  deepStrictEqual(philox([0, 0, 0, 0], [0, 0]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8])
  deepStrictEqual(philox([ones, ones, ones, ones], [ones, ones]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd])
  deepStrictEqual(
    philox([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
    [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
  )
  for (const [seed, offset] of [
    [0n, 0n],
    [-1n, -1n],
    [0x299f31d0a4093822n, 0x05a308d3243f6a88n],
  ] as const)
    draw(4, seed, offset).forEach((word, i) => {
      const kept = (threshold: number) =>
        scope(() => valuesOf(dropout(Tensor.from([1, 1, 1, 1]), threshold / 2 ** 32, { seed, offset }))[i] !== 0)
      ok(kept(word) && !kept(word + 1), `word ${i} of seed ${seed}, offset ${offset} is not ${word}`)
    })
})
itOp('dropout', 'drops p of the elements, within 4 standard deviations', () => {
  const n = 1 << 20
  for (const p of [0.01, 0.2, 0.5, 0.9])
    scope(() => {
      const x = Tensor.from(new Float32Array(n).fill(1))
      const dropped = valuesOf(dropout(x, p, { seed: 42n, offset: 0n })).filter(y => y === 0).length
      ok(Math.abs(dropped - n * p) <= 4 * Math.sqrt(n * p * (1 - p)), `p ${p}: ${dropped} of ${n} were dropped`)
    })
})
itOp('dropout', 'a mask does not spread NaN or infinity, and depends on the position alone', () => {
  scope(() => {
    const position = { seed: 7n, offset: 3n }
    const ones = valuesOf(dropout(Tensor.from(new Float32Array(1000).fill(1)), 0.5, position))
    const wild = valuesOf(dropout(Tensor.from(new Float32Array(1000).fill(Infinity)), 0.5, position))
    const double = valuesOf(dropout(Tensor.from(new Float64Array(1000).fill(1)), 0.5, position))
    ok(ones.every((y, i) => (y === 0 ? wild[i] === 0 : wild[i] === Infinity)))
    deepStrictEqual(ones, double)
  })
})
itOp('dropout', 'p = 0 returns x itself', () => {
  const x = Tensor.zeros([2])
  strictEqual(dropout(x, 0, { seed: 0n, offset: 0n }), x)
  x.dispose()
})
itOp('dropout', 'the same bits for any number of threads', () => {
  sameBits(() => dropout(Tensor.from(new Float32Array(100_001).fill(1)), 0.5, { seed: 1n, offset: 2n }))
})
itOp('dropout', 'names bad arguments', () => {
  const x = Tensor.zeros([2])
  const position = { seed: 0n, offset: 0n }
  for (const p of [1, -0.1, NaN])
    throwsCode(() => dropout(x, p, position), 'ERR_HSTU_INVALID_ARGUMENT', /dropout: p must be in \[0, 1\), got/)
  throwsCode(
    () => dropout(Tensor.zeros([2], { dtype: 'int32' }), 0.1, position),
    'ERR_HSTU_DTYPE',
    /dropout: x must have/,
  )
  x.dispose()
})
