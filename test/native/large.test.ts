// Tensors of more than 2^32 elements on CUDA: their last rows, and the gradients of these, have the bits of those rows alone.
import { record, reshape, valueAndGrad } from '#lib/autograd.js'
import { native } from '#lib/native.js'
import { add } from '#lib/ops/add.js'
import { cast } from '#lib/ops/cast.js'
import { dropout } from '#lib/ops/dropout.js'
import { embedding } from '#lib/ops/embedding.js'
import { hstuAttention } from '#lib/ops/hstu_attention.js'
import { interleave } from '#lib/ops/interleave.js'
import { layerNorm } from '#lib/ops/layer_norm.js'
import { linear } from '#lib/ops/linear.js'
import { mul } from '#lib/ops/mul.js'
import { normGateLinear } from '#lib/ops/norm_gate_linear.js'
import { normLinearSilu } from '#lib/ops/norm_linear_silu.js'
import { randomUniform } from '#lib/ops/random_uniform.js'
import { memory, scope, Tensor } from '#lib/tensor.js'

const { usable, reason } = native.backend().cuda
const enough = usable && memory('cuda').total > 120e9
const why = usable ? 'it takes 120 GB of device memory' : reason
const onLarge = enough ? it : (name: string, _: () => void) => it.skip(`${name}: NOT RUN (${why})`, () => {})

const [H, D, d] = [8, 64, 512]
const tailRows = 512
const T = 2 ** 23 + tailRows
const options = { dtype: 'bfloat16', device: 'cuda' } as const
const noise = (seed: bigint, ...shape: number[]) => randomUniform(shape, { bound: 1, seed, ...options })
const tailOf = (x: Tensor) => x.rows(x.shape[0]! - tailRows, x.shape[0]!)
const bytesOf = (x: Tensor) => Buffer.from(tailOf(x).dataSync().buffer)

/** A scalar whose gradient with respect to y is dy. */
const head = (y: Tensor, dy: Tensor) => record('head', Tensor.zeros([1], { device: 'cuda' }), [y], () => [dy])

/** fn(x), which has a row for each of x, and the gradient of x for the cotangent x. */
function both(x: Tensor, fn: (x: Tensor) => Tensor): Tensor[] {
  const y = fn(x)
  const { grads } = valueAndGrad([x], () => head(fn(x), x.view(y.shape)))
  return [y, grads[0]!]
}

function expectTails(x: Tensor, of: (x: Tensor) => Tensor[]): void {
  const whole = scope(() => of(x).map(bytesOf))
  const alone = scope(() => of(tailOf(x)).map(bytesOf))
  for (const [i, bytes] of whole.entries()) {
    expect(bytes.equals(alone[i]!), `tensor ${i}`).toBe(true)
    expect(bytes.some(byte => byte !== 0)).toBe(true)
  }
}

describe('more than 2^32 elements', () => {
  const offsetsOf = (rows: number, length: number) => {
    const whole = Math.floor(rows / length)
    const offsets = Array.from({ length: whole + 1 }, (_, b) => BigInt(b * length))
    if (whole * length < rows) offsets.push(BigInt(rows))
    return Tensor.from(BigInt64Array.from(offsets), [offsets.length], { device: 'cuda' })
  }
  const attention = (x: Tensor, length: number) => {
    const qkv = reshape(x, [x.shape[0]!, H, D])
    const posW = scope(() => noise(9n, 1, 64))
    return hstuAttention(qkv, qkv, qkv, {
      seqOffsets: offsetsOf(x.shape[0]!, length),
      maxSeqLen: length,
      scale: 1 / length,
      posW,
    })
  }
  const cases: Record<string, (x: Tensor) => Tensor[]> = {
    'add, mul, cast': x => [add(x, x), mul(x, x), cast(x, 'float16')],
    linear: x => both(x, x => linear(x, noise(2n, d, d))),
    layer_norm: x => both(x, x => layerNorm(x)),
    norm_linear_silu: x => Object.values(normLinearSilu(x, noise(3n, d, 4 * d), { heads: H, qkDim: D, vDim: D })),
    norm_gate_linear: x => {
      const heads = x.view([x.shape[0]!, H, D])
      return [normGateLinear(x, heads, heads, noise(4n, d, d))]
    },
    'hstu_attention, sequences of 64': x => both(x, x => attention(x, 64)),
    'hstu_attention, sequences of 512': x => both(x, x => attention(x, 512)),
  }
  for (const [name, of] of Object.entries(cases)) onLarge(name, () => scope(() => expectTails(noise(1n, T, d), of)))

  onLarge('draws go on where those of the rows before end', () =>
    scope(() => {
      const x = noise(1n, T, d)
      const before = BigInt(((T - tailRows) * d) / 4) // four words a counter
      const alone = randomUniform([tailRows, d], { bound: 1, seed: 1n, offset: before, ...options })
      expect(bytesOf(x).equals(bytesOf(alone))).toBe(true)
      const dropped = scope(() => bytesOf(dropout(x, 0.3, { seed: 5n, offset: 0n })))
      expect(dropped.equals(bytesOf(dropout(alone, 0.3, { seed: 5n, offset: before })))).toBe(true)
    }),
  )

  onLarge('rows are found, and get their gradients, at the end of a table', () =>
    scope(() => {
      const table = noise(1n, T, d)
      const order = Array.from({ length: tailRows }, (_, i) => (7 * i) % tailRows)
      const ids = Tensor.from(
        BigInt64Array.from(order, i => BigInt(T - tailRows + i)),
        [tailRows],
        { device: 'cuda' },
      )
      const permuted = (bytes: Buffer) => Buffer.concat(order.map(i => bytes.subarray(2 * d * i, 2 * d * (i + 1))))
      expect(bytesOf(embedding(table, ids)).equals(permuted(bytesOf(table)))).toBe(true)
      const dy = noise(2n, tailRows, d)
      const { grads } = valueAndGrad([table], () => head(embedding(table, ids), dy))
      expect(permuted(bytesOf(grads[0]!)).equals(bytesOf(dy))).toBe(true)
    }),
  )

  onLarge('interleave', () =>
    scope(() => {
      const x = noise(1n, T / 2, d)
      const bytes = scope(() => bytesOf(interleave(x, x)))
      const half = x.rows(T / 2 - tailRows / 2, T / 2)
      expect(bytes.equals(bytesOf(interleave(half, half)))).toBe(true)
    }),
  )
})
