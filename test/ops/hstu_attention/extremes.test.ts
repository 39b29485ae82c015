// HSTU attention where keys are split, and where times, sizes and tables are extreme.
import { ok } from 'node:assert/strict'
import { record, valueAndGrad } from '#lib/autograd.js'
import { type HstuAttentionOptions, hstuAttention } from '#lib/ops/hstu_attention.js'
import { Random } from '#lib/random.js'
import { scope, Tensor } from '#lib/tensor.js'
import { decoded, rounded, sum, throwsCode } from '../../harness.js'
import { type Choice, plain, problemOf } from './cases.js'
import { bucketOf, thresholds } from './oracle.js'
import {
  checkProblem,
  device,
  equalBits,
  everywhere,
  type FloatName,
  float,
  forward,
  type How,
  range,
  starts,
  tensor,
} from './run.js'

everywhere('not deterministic: keys of few rows in several parts, the same ones each time', () => {
  const dtype = device === 'cpu' ? 'float32' : 'bfloat16'
  const bias = { pos: 'shared', time: 'per head' } as const
  const shapes: [Partial<Choice>, number[], number?][] = [
    [{ D: 128, V: 128, H: 2, delta: 8 }, [2600, 0, 900, 40]],
    [{ D: 128, V: 128, delta: 160, targets: 'mixed', g: 2, contextual: 'some', ...bias }, [0, 1700, 1], 64],
    [{ D: 128, V: 64, targets: 'some', ...bias }, [700, 70]],
    [{ D: 64, V: 32, delta: 8, targets: 'some', time: 'shared' }, [3000], 128],
    [{ D: 64, V: 64, full: true, contextual: 'some', targets: 'some' }, [800, 5]],
    [{ D: 256, V: 256, delta: 160, W: 64, F: 5, contextual: 'some', targets: 'one' }, [1500, 0], 64],
    [{ D: 256, V: 128, delta: 8, causal: false, pos: 'shared' }, [2000, 1, 65]],
  ]
  for (const [n, [choice, lengths, pageSize]] of shapes.entries()) {
    const c: Choice = { ...plain, ...choice, alpha: 'root', dtype }
    const p = problemOf(c, lengths, new Random(`not deterministic ${n}`))
    const how = (): How => ({
      ...{ dtype, rowScales: n % 2 === 0, deterministic: false },
      ...(pageSize ? { pageSize, random: new Random(n) } : {}),
    })
    checkProblem(p, how(), `shape ${n}`)
    equalBits(forward(p, how()), forward(p, how()), `shape ${n} again`)
    if (device === 'cpu') equalBits(forward(p, how()), forward(p, { ...how(), deterministic: true }), `shape ${n}`)
  }
})

everywhere('every bucket edge, up to differences of 63 bits', () => {
  // v = 1 and q = 0: the output is silu of the bucket's own entry.
  const edges = thresholds.filter(t => t < 1n << 52n).flatMap(t => [t - 1n, t, t + 1n])
  const far = range(53, 63).flatMap(bits => [1n << BigInt(bits), (3n << BigInt(bits)) / 2n])
  const times = BigInt64Array.from([0n, 1n, ...edges, ...far])
  scope(() => {
    const L = times.length
    const out = hstuAttention(
      Tensor.zeros([1, 1, 1]),
      Tensor.zeros([L, 1, 1]),
      Tensor.from(new Float32Array(L).fill(1), [L, 1, 1]),
      {
        seqOffsets: Tensor.from(BigInt64Array.of(0n, BigInt(L))),
        qOffsets: Tensor.from(BigInt64Array.of(0n, 1n)),
        maxSeqLen: L,
        scale: 1,
        queryTime: Tensor.from(BigInt64Array.of(0n)),
        keyTime: Tensor.from(times),
        timeW: Tensor.from(
          Float32Array.from({ length: 201 }, (_, i) => 20 + i),
          [1, 201],
        ),
      },
    )
    const want = sum(Array.from(times, t => 20 + bucketOf(t, 0n)))
    ok(Math.abs(out.item() - want) < 0.5, `sum of buckets is ${out.item()}, expected ${want}`)
  })
})

everywhere('gradients where P and the cotangent are large or small, in float16 too', () => {
  const dtype = device === 'cpu' ? 'float32' : 'float16'
  const scaled = (data: Float64Array, factor: number) => data.map(x => factor * x)
  for (const [softmax, bias] of [false, true].flatMap(x => (['shared', 'none'] as const).map(y => [x, y] as const))) {
    const choice: Choice = { ...plain, D: 64, V: 64, H: 2, pos: bias, time: bias, targets: 'some', softmax }
    const p = problemOf({ ...choice, alpha: 'root', dtype }, [130, 70], new Random('range'))
    const how: How = { dtype, rowScales: false, tables: 'float32' } // whose gradients pass the range of float16
    const [wideQ, wideK] = [scaled(p.q, 32), scaled(p.k, 32)] // and alpha so much smaller: dq and dk stay in range, dS does not
    const large = { ...p, q: wideQ, k: wideK, v: scaled(p.v, 32), alpha: p.alpha / 1024 }
    checkProblem(large, how, 'large dout v', 2048)
    const [q, k, v] = [p.q, p.k, p.v].map(x => scaled(x, 2 ** -12)) as [Float64Array, Float64Array, Float64Array]
    const scales = p.scales.map(() => 1)
    checkProblem({ ...p, q, k, v, scales, alpha: 2 ** 24 * p.alpha }, how, 'small dout v', 2 ** -12)
    const tiny = { ...p, v: scaled(p.v, 2 ** 20), scales: p.scales.map(() => 2 ** -128) }
    checkProblem(tiny, { dtype: 'float32', rowScales: true }, 'tiny scales', 2 ** 20)
  }
})

everywhere('alpha 0, or next to nothing: the bias alone', () => {
  const dtype = device === 'cpu' ? 'float32' : 'bfloat16'
  for (const [alpha, softmax] of [0, 1e-30].flatMap(x => [false, true].map(y => [x, y] as const))) {
    const choice: Choice = {
      ...plain,
      D: 64,
      V: 64,
      H: 2,
      pos: 'shared',
      time: 'per head',
      targets: 'some',
      softmax,
      dtype,
    }
    const p = problemOf(choice, [130, 70], new Random('alpha'))
    checkProblem({ ...p, alpha }, { dtype, rowScales: false }, `alpha ${alpha}`)
  }
})

everywhere('no bias, in each head dim and 16-bit type: kernels of their own', () => {
  const dtypes: FloatName[] = device === 'cpu' ? ['float32'] : ['bfloat16', 'float16']
  const shapes: Partial<Choice>[] = [
    { causal: false },
    { W: 64, F: 5, contextual: 'some', g: 2 },
    { full: true, contextual: 'mixed', W: 7 },
  ]
  for (const [n, D] of ([32, 64, 128, 256] as const).entries())
    for (const [dtype, softmax] of dtypes.flatMap(x => [false, true].map(y => [x, y] as const))) {
      const choice: Choice = { ...plain, D, V: D === 32 ? 16 : D, H: 2, targets: 'mixed', ...shapes[n % 3], softmax }
      const p = problemOf({ ...choice, alpha: 'root', dtype }, [1, 65, 257, 130], new Random(`no bias ${D}`))
      checkProblem(p, { dtype, rowScales: n % 2 === 0 }, `${dtype} D ${D}${softmax ? ' softmax' : ''}`)
    }
})

everywhere('a bias table too large for sums of its own for every tile of keys', () => {
  const dtype = device === 'cpu' ? 'float32' : 'bfloat16'
  const p = problemOf({ ...plain, H: 4, V: 16, dtype }, Array<number>(20).fill(10), new Random('tables'))
  const cols = 2 ** 20
  const data = rounded(
    Float64Array.from({ length: 4 * cols }, (_, x) => Math.sin(x)),
    dtype,
  )
  checkProblem({ ...p, pos: { rows: 4, cols, data } }, { dtype, rowScales: false }, 'P = 2^20')
})

everywhere('many short sequences: a block of the backward takes several, with equal times or few buckets', () => {
  const dtype = device === 'cpu' ? 'float32' : 'bfloat16'
  const lengths = range(0, 160).map(n => (n * 13) % 31)
  for (const [D, step] of [
    [64, 0],
    [64, 1],
    [128, 1],
    [128, 40],
  ] as const) {
    const choice: Choice = { ...plain, D, V: D, H: 2, pos: 'shared', time: 'shared', alpha: 'root', dtype }
    const p = problemOf(choice, lengths, new Random(`many ${D}`))
    const times = p.keyTime.map((_, i) => 1_600_000_000n + BigInt(step * Math.floor(i / 7)))
    // N as where sequences are long enough for the kernels for Hopper.
    const short = { ...p, N: 600, queryTime: times, keyTime: times }
    checkProblem(short, { dtype, rowScales: false }, `D ${D}, step ${step}`)
  }
})

everywhere('keys that targets alone see, in more tiles than there are blocks', () => {
  const dtype = device === 'cpu' ? 'float32' : 'bfloat16'
  for (const [D, count] of [
    [64, 100],
    [128, 70],
  ] as const) {
    const choice: Choice = { ...plain, D, V: 16, H: 2, pos: 'shared', time: 'shared', alpha: 'root', dtype }
    const p = problemOf(choice, Array<number>(count).fill(132), new Random(`own tiles ${D}`))
    checkProblem({ ...p, N: 600, targets: p.targets.map(() => 80) }, { dtype, rowScales: false }, `D ${D}`)
  }
})

everywhere('a bucket that hides its pairs, beside others', () => {
  const dtype = device === 'cpu' ? 'float32' : 'bfloat16'
  for (const D of [64, 128] as const) {
    const choice: Choice = { ...plain, D, V: D, H: 2, pos: 'shared', time: 'shared', NB: 40, alpha: 'root', dtype }
    const p = problemOf(choice, [200, 130], new Random(`hidden bucket ${D}`))
    const times = p.keyTime.map((_, i) => (i % 200 < 160 ? 0n : 2n))
    const data = p.time!.data.map((x, i) => (i === 0 ? -1e9 : x))
    const hiding = { ...p, N: 600, queryTime: times, keyTime: times, time: { ...p.time!, data: rounded(data, dtype) } }
    checkProblem(hiding, { dtype, rowScales: false }, `D ${D}`)
  }
})

everywhere('geometry out of range: an error, or on CUDA without HSTU_DEBUG=1 limited', () => {
  scope(() => {
    const rows = Float64Array.from({ length: 12 * 2 * 16 }, (_, i) => Math.sin(i))
    const [q, k, v] = [1, 2, 3].map(n =>
      float(
        rounded(
          rows.map(x => n * x),
          'float32',
        ),
        [12, 2, 16],
        'float32',
      ),
    ) as [Tensor, Tensor, Tensor]
    const attend = (options: Partial<HstuAttentionOptions>) => {
      let out: Float64Array = new Float64Array()
      const { grads } = valueAndGrad([q, k, v], () => {
        const base = { seqOffsets: starts([5, 7]), maxSeqLen: 7, scale: 1, targetGroupSize: 3 }
        const y = hstuAttention(q, k, v, { ...base, ...options })
        out = decoded(y)
        return record('cotangent', Tensor.zeros([1], { device }), [y], () => [float(rows, [12, 2, 16], 'float32')])
      })
      return [out, ...(grads as Tensor[]).map(decoded)]
    }
    const targets = (...counts: number[]) => ({ numTargets: tensor(Int32Array.from(counts)) })
    const cases: [Partial<HstuAttentionOptions>, RegExp, Partial<HstuAttentionOptions>, number][] = [
      [targets(9, 2), /sequence 0 has 9 targets but 5 keys/, targets(5, 2), 12],
      [targets(-1, 2), /sequence 0 has -1 targets but 5 keys/, targets(0, 2), 12],
      [{ maxSeqLen: 6 }, /sequence 1 has 7 keys, max_seq_len is 6/, {}, 5],
      [{ qOffsets: starts([6, 6]) }, /sequence 0 has 6 queries but only 5 keys/, {}, 5],
    ]
    for (const [wrong, message, limited, alike] of cases) {
      if (device === 'cpu' || process.env.HSTU_DEBUG === '1') {
        throwsCode(() => attend(wrong), 'ERR_HSTU_INVALID_ARGUMENT', message)
        continue
      }
      const [got, want] = [attend(wrong), attend(limited)]
      const count = alike * 2 * 16
      got.forEach((values, i) => {
        equalBits(values.subarray(0, count), want[i]!.subarray(0, count), `${message} ${i}`)
      })
    }
  })
})

everywhere('rows of no sequence: an error, or on CUDA without HSTU_DEBUG=1 nothing to do', () => {
  const dtype = device === 'cpu' ? 'float32' : 'bfloat16'
  for (const [D, deterministic] of [64, 128, 256].flatMap(x => [true, false].map(y => [x, y] as const)))
    for (const P of [0, 16])
      scope(() => {
        const zeros = (...shape: number[]) => Tensor.zeros(shape, { dtype, device })
        const [q, k, v, posW] = [zeros(5, 2, D), zeros(5, 2, D), zeros(5, 2, D), zeros(1, Math.max(P, 1))]
        const options = { seqOffsets: starts([]), maxSeqLen: 2048, scale: 1, deterministic, ...(P ? { posW } : {}) }
        const attend = () =>
          valueAndGrad([q, posW].slice(0, P ? 2 : 1), () => {
            const y = hstuAttention(q, k, v, options)
            return record('cotangent', Tensor.zeros([1], { device }), [y], () => [zeros(5, 2, D)])
          }).grads as Tensor[]
        if (device === 'cpu' || process.env.HSTU_DEBUG === '1')
          throwsCode(attend, 'ERR_HSTU_INVALID_ARGUMENT', /seq_offsets/)
        else
          attend().forEach((grad, i) => {
            const values = decoded(grad)
            ok(i === 0 ? values.length === 5 * 2 * D : values.every(x => x === 0), `gradient ${i}`)
          })
      })
})

// ---- Errors -----------------------------------------------------------------------------------------------------------------
