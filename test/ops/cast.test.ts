import { deepStrictEqual, ok, strictEqual } from 'node:assert/strict'
import { record, valueAndGrad } from '#lib/autograd.js'
import { cast, castAll } from '#lib/ops/cast.js'
import { Random } from '#lib/random.js'
import { type Dtype, scope, Tensor } from '#lib/tensor.js'
import { describeOp, itOp, normal, sameBits, throwsCode } from '../harness.js'

describeOp<{ shape: readonly number[] }>('cast', {
  cases: [
    { name: 'empty', shape: [0, 3] },
    { name: 'scalar', shape: [] },
    { name: 'matrix', shape: [17, 33] },
    { name: 'past one task', shape: [16385] },
  ],
  inputs: ({ shape }, random) => ({ x: normal(random, shape) }),
  run: t => cast(t.x!, 'float64'),
  reference: x => [x.x!],
  gradients: ['x'],
  tolerance: { float32: 1e-8, float64: 0 },
})

const names = Array.from({ length: 130 }, (_, n) => `x${n}`)

describeOp<{ sizes: readonly number[] }>('cast', {
  cases: [
    { name: 'none', sizes: [] },
    { name: 'several together, one empty, one past a chunk', sizes: [3, 0, 8193, 16, 1] },
    { name: 'more together than a launch takes', sizes: names.map((_, n) => n % 4) },
  ],
  inputs: ({ sizes }, random) => {
    const first = { x: normal(random, [2, 5]) }
    return { ...first, ...Object.fromEntries(sizes.map((size, n) => [names[n]!, normal(random, [size])])) }
  },
  run: t => Object.values(castAll(t, 'float64')),
  reference: x => Object.values(x),
  gradients: ['x', ...names],
  tolerance: { float32: 1e-8, float64: 0 },
})

/** Exponent and mantissa bits of the 16-bit floats. */
const formats = { bfloat16: [8, 7], float16: [5, 10] } as const
type Half = keyof typeof formats

/** The value that 16 bits stand for, by the definition of the format. */
function decode(bits: number, format: Half): number {
  const [exponents, mantissas] = formats[format]
  const sign = bits >> 15 ? -1 : 1
  const exponent = (bits >> mantissas) & (2 ** exponents - 1)
  const fraction = (bits & (2 ** mantissas - 1)) / 2 ** mantissas
  const bias = 2 ** (exponents - 1) - 1
  if (exponent === 2 ** exponents - 1) return fraction ? NaN : sign * Infinity
  return sign * (exponent ? (1 + fraction) * 2 ** (exponent - bias) : fraction * 2 ** (1 - bias))
}

const tables = Object.fromEntries(
  (Object.keys(formats) as Half[]).map(format => [
    format,
    Array.from({ length: 65536 }, (_, bits) => decode(bits, format)),
  ]),
) as Record<Half, number[]>

const infinityBits = { bfloat16: 0x7f80, float16: 0x7c00 }

/** Bits of the nearest value, ties to the even one, by search among all values. */
function nearestHalf(x: number, format: Half, exact?: bigint): number {
  if (Number.isNaN(x)) return NaN
  const table = tables[format]
  const sign = x < 0 || Object.is(x, -0) ? 0x8000 : 0
  const infinity = infinityBits[format]
  const beyond = 2 * table[infinity - 1]! - table[infinity - 2]! // infinity as the next step of the table
  const value = (bits: number) => (bits === infinity ? beyond : table[bits]!)
  const above = (bits: number) => {
    // Whether |x| is above (1), at (0) or below (-1) the middle of `bits` and the next value.
    const middle = value(bits) / 2 + value(bits + 1) / 2
    if (exact !== undefined && Number.isInteger(middle)) {
      const [a, b] = [exact < 0n ? -exact : exact, BigInt(middle)]
      return a > b ? 1 : a < b ? -1 : 0
    }
    return Math.sign(Math.abs(x) - middle)
  }
  let [low, high] = [0, infinity]
  while (low < high) {
    const middle = (low + high) >> 1
    const side = above(middle)
    if (side > 0 || (side === 0 && middle % 2 === 1)) low = middle + 1
    else high = middle
  }
  return sign | low
}

const bitsOf = (tensor: Tensor) => tensor.dataSync() as Uint16Array
const from = (data: Float32Array | Float64Array | Int32Array | BigInt64Array) => Tensor.from(data)
const half = (bits: Uint16Array, dtype: Half) => Tensor.from(bits, [bits.length], { dtype })

/** Values where rounding is hard: near every kind of boundary of a 16-bit format, as float64. */
function hardValues(format: Half): number[] {
  const random = new Random(format)
  const table = tables[format]
  const values = [
    0,
    -0,
    NaN,
    Infinity,
    -Infinity,
    1e-320,
    -1e-45,
    1e300,
    -1e300,
    3.4028235677973366e38,
    65519.999,
    65520,
    65504,
  ]
  for (let i = 0; i < 10_000; i++) {
    const bits = random.int(65535)
    const [a, b] = [table[bits]!, table[bits + 1]!]
    const middle = (a + b) / 2
    if (!Number.isFinite(middle)) continue
    values.push(
      a,
      middle,
      middle * (1 + 2 ** -52),
      middle * (1 - 2 ** -52),
      middle * (1 + 2 ** -30),
      a + (b - a) * random.float(),
    )
  }
  return values
}

for (const format of ['bfloat16', 'float16'] as const) {
  itOp('cast', `${format} widens exactly, and back to the same bits`, () => {
    scope(() => {
      const all = Uint16Array.from({ length: 65536 }, (_, bits) => bits)
      for (const dtype of ['float32', 'float64'] as const) {
        const wide = cast(half(all, format), dtype)
        const values = wide.dataSync() as Float64Array
        for (const bits of all) ok(Object.is(values[bits], tables[format][bits]), `bits ${bits}: ${values[bits]}`)
        bitsOf(cast(wide, format)).forEach((bits, i) => {
          if (Number.isNaN(tables[format][i]!)) ok(Number.isNaN(tables[format][bits]!), `NaN ${i} became ${bits}`)
          else strictEqual(bits, i)
        })
      }
    })
  })
  itOp('cast', `${format} is rounded once, to nearest even, from float64 and float32`, () => {
    scope(() => {
      const values = hardValues(format)
      for (const data of [Float64Array.from(values), Float32Array.from(values)])
        bitsOf(cast(from(data), format)).forEach((bits, i) => {
          const expected = nearestHalf(data[i]!, format)
          if (Number.isNaN(expected)) ok(Number.isNaN(tables[format][bits]!), `NaN became ${bits}`)
          else strictEqual(bits, expected, `${data[i]}`)
        })
    })
  })
  itOp('cast', `${format} is rounded once from integers`, () => {
    scope(() => {
      const random = new Random(1)
      const longs = Array.from({ length: 5000 }, () => {
        const x = (BigInt(random.uint32()) << 32n) | BigInt(random.uint32())
        const short = BigInt.asIntN(64, x) >> BigInt(random.int(63))
        return random.int(2) ? short : ((short >> 40n) << 40n) + BigInt(random.int(3) - 1)
      })
      const middles = [
        255n,
        256n,
        257n,
        259n,
        2049n,
        2051n,
        65519n,
        65520n,
        (1n << 62n) + (1n << 54n),
        (1n << 62n) + (1n << 54n) + 1n,
      ]
      const edges = [0n, -1n, (1n << 63n) - 1n, -(1n << 63n), (1n << 53n) + 1n, ...middles, ...middles.map(x => -x)]
      const all = BigInt64Array.from([...longs, ...edges])
      bitsOf(cast(from(all), format)).forEach((bits, i) => {
        strictEqual(bits, nearestHalf(Number(all[i]!), format, all[i]!), `${all[i]}`)
      })
      const ints = Int32Array.from(longs, Number)
      bitsOf(cast(from(ints), format)).forEach((bits, i) => {
        strictEqual(bits, nearestHalf(ints[i]!, format), `${ints[i]}`)
      })
    })
  })
  itOp('cast', `${format} to the other 16-bit float`, () => {
    scope(() => {
      const other = format === 'bfloat16' ? 'float16' : 'bfloat16'
      const all = Uint16Array.from({ length: 65536 }, (_, bits) => bits)
      bitsOf(cast(half(all, format), other)).forEach((bits, i) => {
        const expected = nearestHalf(tables[format][i]!, other)
        if (Number.isNaN(expected)) ok(Number.isNaN(tables[other][bits]!))
        else strictEqual(bits, expected)
      })
    })
  })
}

itOp('cast', 'float64 and integers to float32', () => {
  scope(() => {
    const random = new Random(2)
    const doubles = Float64Array.from([
      0,
      -0,
      NaN,
      Infinity,
      1e300,
      1e-46,
      16777217,
      ...Array.from({ length: 999 }, () => random.normal()),
    ])
    deepStrictEqual(cast(from(doubles), 'float32').dataSync(), Float32Array.from(doubles))
    const ints = Int32Array.from([0, 1, -1, 16777217, 16777219, 2147483647, -2147483648, 33554435])
    deepStrictEqual(cast(from(ints), 'float32').dataSync(), Float32Array.from(ints))
    deepStrictEqual(cast(from(ints), 'float64').dataSync(), Float64Array.from(ints))
    // 2^60 + 2^36 + 1 is just above the middle of two float32 values; by way of float64 it would fall on the middle.
    const longs = BigInt64Array.from([
      0n,
      -5n,
      (1n << 60n) + (1n << 36n) + 1n,
      -(1n << 60n) - (1n << 36n) - 1n,
      (1n << 63n) - 1n,
      (1n << 53n) + 1n,
    ])
    const [up, two53] = [2 ** 60 + 2 ** 37, 2 ** 53]
    deepStrictEqual(cast(from(longs), 'float32').dataSync(), Float32Array.of(0, -5, up, -up, 2 ** 63, two53))
    deepStrictEqual(cast(from(longs), 'float64').dataSync(), Float64Array.from(longs, Number))
  })
})
itOp('cast', 'to integers: toward zero, saturating, NaN is 0', () => {
  scope(() => {
    const values = [
      0,
      -0,
      0.99,
      -0.99,
      1.5,
      -1.5,
      NaN,
      Infinity,
      -Infinity,
      2147483520,
      2147483648,
      -2147483648,
      -2147483904,
      1e30,
      -1e30,
      9.2e18,
    ]
    const clamp = (x: number, bits: number) => {
      if (Number.isNaN(x)) return 0n
      const [low, high] = [-(1n << BigInt(bits - 1)), (1n << BigInt(bits - 1)) - 1n]
      if (!Number.isFinite(x)) return x > 0 ? high : low
      const whole = BigInt(Math.trunc(x))
      return whole < low ? low : whole > high ? high : whole
    }
    for (const data of [Float32Array.from(values), Float64Array.from([...values, 2147483647.9, -2147483648.9])]) {
      deepStrictEqual(
        [...cast(from(data), 'int32').dataSync()].map(BigInt),
        Array.from(data, x => clamp(x, 32)),
      )
      deepStrictEqual(
        [...(cast(from(data), 'int64').dataSync() as BigInt64Array)],
        Array.from(data, x => clamp(x, 64)),
      )
    }
    for (const format of ['bfloat16', 'float16'] as const) {
      const all = Uint16Array.from({ length: 65536 }, (_, bits) => bits)
      deepStrictEqual(
        [...cast(half(all, format), 'int32').dataSync()].map(BigInt),
        tables[format].map(x => clamp(x, 32)),
      )
      deepStrictEqual(
        [...(cast(half(all, format), 'int64').dataSync() as BigInt64Array)],
        tables[format].map(x => clamp(x, 64)),
      )
    }
    const longs = BigInt64Array.from([0n, -7n, 1n << 31n, -(1n << 31n) - 1n, 1n << 62n, 2147483647n])
    const ints = Int32Array.of(0, -7, 2147483647, -2147483648, 2147483647, 2147483647)
    deepStrictEqual(cast(from(longs), 'int32').dataSync(), ints)
    deepStrictEqual(cast(from(ints), 'int64').dataSync(), BigInt64Array.from(ints, BigInt))
  })
})
itOp('cast', 'the same dtype returns x itself', () => {
  const x = Tensor.zeros([2])
  strictEqual(cast(x, 'float32'), x)
  x.dispose()
})
itOp('cast', 'the gradient comes back in the dtype of x, and none through an integer', () => {
  scope(() => {
    const gradient = (through: Dtype) => {
      const x = Tensor.from([1.5, -2.5, 3])
      const { grads } = valueAndGrad([x], () => {
        const y = cast(x, through)
        return record('head', Tensor.zeros([1]), [y], () => [cast(Tensor.from([1, 2, 1 + 2 ** -20]), through)])
      })
      return [...grads[0]!.dataSync()]
    }
    deepStrictEqual(gradient('float64'), [1, 2, 1 + 2 ** -20])
    deepStrictEqual(gradient('bfloat16'), [1, 2, 1])
    deepStrictEqual(gradient('int32'), [0, 0, 0])
  })
})
itOp('cast', 'together: one node of the tape, gradients where they flow, what has the dtype stays itself', () => {
  scope(() => {
    const [a, b, c] = [Tensor.from([1, 2]), Tensor.from([3]), Tensor.zeros([1], { dtype: 'float64' })]
    const { grads } = valueAndGrad({ a, b, c }, () => {
      const y = castAll({ a, b, c }, 'float64')
      strictEqual(y.c, c)
      deepStrictEqual([...y.a!.dataSync(), ...y.b!.dataSync()], [1, 2, 3])
      return record('head', Tensor.zeros([1]), [y.b!], () => [Tensor.from(Float64Array.of(7))])
    })
    deepStrictEqual([...grads.a.dataSync(), ...grads.b.dataSync()], [0, 0, 7])
  })
  const [x, y] = [Tensor.zeros([1]), Tensor.zeros([1], { dtype: 'int32' })]
  throwsCode(() => castAll({ x, y }, 'float64'), 'ERR_HSTU_DTYPE', /castAll: y must have a float dtype, got int32\[1\]/)
  for (const tensor of [x, y]) tensor.dispose()
})
itOp('cast', 'the same bits for any number of threads', () => {
  const values = Float32Array.from({ length: 100_001 }, (_, i) => Math.sin(i))
  sameBits(() =>
    (['float64', 'bfloat16', 'float16', 'int32', 'int64'] as const).map(dtype => cast(from(values), dtype)),
  )
})
