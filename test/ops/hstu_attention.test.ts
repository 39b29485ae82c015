import { valueAndGrad } from '#lib/autograd.js'
import { type HstuAttentionOptions, hstuAttention } from '#lib/ops/hstu_attention.js'
import { Random } from '#lib/random.js'
import { Tensor } from '#lib/tensor.js'
import { describeOp, int32, int64, itOp, offsets, sum, throwsCode } from '../harness.js'
import { type Choice, cover, pick, plain, problemOf } from './hstu_attention/cases.js'
import { oracle, type Problem, type Table } from './hstu_attention/oracle.js'
import { checkProblem, device, everywhere, fixedOptions, type How } from './hstu_attention/run.js'

const short = [0, 1, 63, 64, 65, 99, 128]

function checkChoice(c: Choice, n: number): void {
  const random = new Random(`hstu_attention ${n}`)
  let lengths = Array.from({ length: 1 + random.int(4) }, () => pick(random, short))
  if (n % 5 === 0) lengths.push(257)
  if (n % 40 === 7) lengths = [1111, 0, 65]
  if (n % 200 === 11) lengths = [3, 2000]
  const long = sum(lengths) > 1000
  const choice = long || c.dropout > 0 ? { ...c, H: 1 as const, D: long ? pick(random, [16, 25] as const) : c.D } : c
  const p = problemOf(choice, lengths, random)
  const how: How = { dtype: c.dtype, rowScales: c.rowScales, ...(c.pageSize ? { pageSize: c.pageSize, random } : {}) }
  checkProblem(p, how, `case ${n}: ${JSON.stringify({ ...choice, lengths })}`)
}

const total = Number(process.env.HSTU_ATTENTION_CASES ?? 400)
const choices = [...cover(total)]
for (let begin = 0; begin < total; begin += 25)
  everywhere(`against the oracle, cases ${begin} to ${Math.min(total, begin + 25) - 1}`, () => {
    for (let n = begin; n < Math.min(total, begin + 25); n++) {
      const dtype =
        device === 'cpu' ? choices[n]!.dtype : (['bfloat16', 'float32', 'bfloat16', 'float16'] as const)[n % 4]!
      checkChoice({ ...choices[n]!, dtype }, n)
    }
  })

// ---- Small cases with finite differences ---------------------------------------------------------------------------------------

type Small = Partial<Choice> & { lengths: number[] }

function smallProblem(c: Small, data?: Record<string, Float64Array>): Problem {
  const p = problemOf({ ...plain, P: 40, NB: 40, ...c, dtype: 'float64' }, c.lengths, new Random(JSON.stringify(c)))
  p.scales.forEach((scale, i) => {
    p.scales[i] = Math.fround(scale)
  })
  if (!data) return p
  const table = (old: Table | null, now?: Float64Array) => old && { ...old, data: now! }
  return { ...p, q: data.q!, k: data.k!, v: data.v!, pos: table(p.pos, data.pos), time: table(p.time, data.time) }
}

describeOp<Small>('hstu_attention', {
  cases: [
    { name: 'no sequences', lengths: [] },
    { name: 'only empty sequences', lengths: [0, 0] },
    { name: 'one token', lengths: [1] },
    { name: 'silu', lengths: [3, 0, 9] },
    { name: 'bias', lengths: [5, 33], pos: 'shared', time: 'shared', H: 2 },
    {
      name: 'bias per head, contextual',
      lengths: [12, 7],
      pos: 'per head',
      time: 'per head',
      H: 2,
      contextual: 'mixed',
    },
    { name: 'targets', lengths: [6, 20], targets: 'some', pos: 'shared', time: 'shared', g: 2 },
    { name: 'all targets', lengths: [1, 6], targets: 'all', pos: 'shared', time: 'shared', g: 5 },
    { name: 'window', lengths: [40], W: 7, F: 5, contextual: 'some', pos: 'shared' },
    { name: 'not causal', lengths: [11, 2], causal: false, W: 1, time: 'shared', rowScales: true },
    { name: 'delta', lengths: [10, 4], delta: 8, alpha: 'root' },
    { name: 'softmax', lengths: [5, 12], softmax: true, pos: 'shared', targets: 'one' },
    {
      name: 'softmax with dropout',
      lengths: [9, 6],
      softmax: true,
      dropout: 0.3,
      time: 'shared',
      H: 2,
      targets: 'mixed',
    },
    { name: 'contextual rows see all', lengths: [9], full: true, contextual: 'some', targets: 'one' },
  ],
  inputs: c => {
    const p = smallProblem(c)
    const values = (data: Float64Array, shape: number[]) => ({ shape, data: data.slice(), kind: 'float' as const })
    return {
      q: values(p.q, [sum(p.queries), p.H, p.D]),
      k: values(p.k, [sum(p.lengths), p.H, p.D]),
      v: values(p.v, [sum(p.lengths), p.H, p.V]),
      pos: p.pos && values(p.pos.data, [p.pos.rows, p.pos.cols]),
      time: p.time && values(p.time.data, [p.time.rows, p.time.cols]),
      seqOffsets: offsets(p.lengths),
      qOffsets: offsets(p.queries),
      numTargets: int32(p.targets),
      contextual: int32(p.contextual),
      queryTime: int64([...p.queryTime]),
      keyTime: int64([...p.keyTime]),
      scale: { shape: [p.scales.length], data: p.scales, kind: 'float32' },
    }
  },
  run: (t, c) => {
    const p = smallProblem(c)
    return hstuAttention(t.q!, t.k!, t.v!, {
      seqOffsets: t.seqOffsets!,
      qOffsets: t.qOffsets!,
      numTargets: t.numTargets!,
      contextual: t.contextual!,
      posW: t.pos ?? null,
      timeW: t.time ?? null,
      queryTime: t.queryTime!,
      keyTime: t.keyTime!,
      scale: t.scale!,
      ...fixedOptions(p),
    })
  },
  reference: (x, c) => [oracle(smallProblem(c, x), null).out],
  gradients: ['q', 'k', 'v', 'pos', 'time'],
})

const call = (options: Partial<HstuAttentionOptions>, L = 3) =>
  hstuAttention(Tensor.zeros([L, 2, 4]), Tensor.zeros([L, 2, 4]), Tensor.zeros([L, 2, 5]), {
    seqOffsets: Tensor.from(BigInt64Array.of(0n, BigInt(L))),
    maxSeqLen: L,
    scale: 1,
    ...options,
  })

itOp('hstu_attention', 'errors name the argument', () => {
  const invalid = 'ERR_HSTU_INVALID_ARGUMENT'
  throwsCode(() => call({ numTargets: Tensor.from(Int32Array.of(4)) }), invalid, /sequence 0 has 4 targets but 3 keys/)
  throwsCode(() => call({ maxSeqLen: 2 }), invalid, /sequence 0 has 3 keys, max_seq_len is 2/)
  throwsCode(() => call({ scale: undefined as unknown as number }), invalid, /scale is required for silu/)
  throwsCode(() => call({ dropout: 0.5 }), invalid, /dropout 0.5/)
  throwsCode(() => call({ targetGroupSize: 0 }), invalid, /targetGroupSize 0 is no count/)
  throwsCode(() => call({ timeW: Tensor.zeros([1, 5]) }), invalid, /timeW needs queryTime and keyTime/)
  throwsCode(
    () => call({ posW: Tensor.zeros([3, 5]) }),
    invalid,
    /posW must have shape \[1 or 2, at least 1\], got \[3, 5\]/,
  )
  throwsCode(
    () => call({ numTargets: Tensor.zeros([2], { dtype: 'int32' }) }),
    'ERR_HSTU_SHAPE',
    /numTargets .*int32\[2\]/,
  )
  throwsCode(() => call({ numTargets: Tensor.zeros([1]) }), 'ERR_HSTU_DTYPE', /numTargets must be int32/)
  const [q, k] = [Tensor.zeros([3, 2, 4]), Tensor.zeros([3, 1, 4])]
  const options = { seqOffsets: Tensor.zeros([2], { dtype: 'int64' }), maxSeqLen: 3, scale: 1 }
  throwsCode(() => hstuAttention(q, k, k, options), 'ERR_HSTU_SHAPE', /hstu_attention: k .*H=2.*float32\[3, 1, 4\]/)
  for (const tensor of [q, k, options.seqOffsets]) tensor.dispose()
})

itOp('hstu_attention', 'a cache takes no gradient, and its page table is checked', () => {
  const cache = (page: number) => ({
    pages: Tensor.zeros([2, 2, 4, 2, 5]),
    pageTable: Tensor.from(Int32Array.of(page)),
    pageOffsets: Tensor.from(BigInt64Array.of(0n, 1n)),
    kvLengths: Tensor.from(Int32Array.of(3)),
  })
  throwsCode(() => call({ paged: cache(2), maxSeqLen: 9 }), 'ERR_HSTU_INVALID_ARGUMENT', /page 2 of 2/)
  const w = Tensor.zeros([1, 4])
  const tracked = () => valueAndGrad([w], () => call({ paged: cache(1), maxSeqLen: 9, posW: w }))
  throwsCode(tracked, 'ERR_HSTU_INVALID_ARGUMENT', /paged history takes no gradient/)
  w.dispose()
})
