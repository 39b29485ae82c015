import { reshape, valueAndGrad } from '#lib/autograd.js'
import { candidatePairs, TargetAttention } from '#lib/layers/target_attention.js'
import { mseLoss } from '#lib/ops/mse_loss.js'
import { Random } from '#lib/random.js'
import { memory, scope, Tensor } from '#lib/tensor.js'

const offsetsOf = (lengths: number[]) => {
  let total = 0
  return BigInt64Array.from([0, ...lengths.map(length => (total += length))], BigInt)
}
const matrix = (random: Random, rows: number, cols: number, dtype: 'float32' | 'float64') =>
  Tensor.from(
    Float64Array.from({ length: rows * cols }, () => random.normal()),
    [rows, cols],
    { dtype },
  )

/** DIN's unit on [q, k, q - k, q * k], pair by pair; the first layer's four blocks are given. */
function reference(
  p: Record<string, number[]>,
  q: number[],
  events: number[][],
  hidden: readonly [number, number],
  scale: number,
) {
  const d = q.length
  const out = new Array<number>(d).fill(0)
  const sigmoid = (x: number) => 1 / (1 + Math.exp(-x))
  for (const k of events) {
    const difference = q.map((x, i) => x - k[i]!)
    const product = q.map((x, i) => x * k[i]!)
    const z = Array.from({ length: hidden[0] }, (_, h) => {
      let sum = p.bias![h]!
      for (const [input, block] of [
        [q, p.q],
        [k, p.k],
        [difference, p.difference],
        [product, p.product],
      ] as const)
        for (let i = 0; i < d; i++) sum += input[i]! * block![i * hidden[0] + h]!
      return sum
    })
    const mean = z.reduce((a, b) => a + b) / z.length
    const variance = z.reduce((a, b) => a + (b - mean) ** 2, 0) / z.length
    const gated = z.map(
      (x, h) => x * sigmoid(((x - mean) / Math.sqrt(variance + 1e-6)) * p.normWeight![h]! + p.normBias![h]!),
    )
    let weight = p.outputBias![0]!
    for (let o = 0; o < hidden[1]; o++) {
      const x = gated.reduce((sum, value, h) => sum + value * p.hidden![h * hidden[1] + o]!, p.hiddenBias![o]!)
      weight += x * sigmoid(x) * p.output![o]!
    }
    for (let i = 0; i < d; i++) out[i]! += scale * weight * k[i]!
  }
  return out
}

const history = [3, 0, 5, 1]
const candidates = [2, 1, 3, 0]

function setting(dtype: 'float32' | 'float64') {
  const random = new Random(4)
  const config = { dim: 5, hidden: [7, 3] as const, scale: 0.25 }
  const layer = new TargetAttention(config, random, { dtype })
  for (const name of ['bias', 'normBias', 'hiddenBias', 'outputBias', 'normWeight']) {
    const x = layer.parameters[name]!
    const values = Float64Array.from({ length: x.size }, () => random.normal())
    x.write(dtype === 'float64' ? values : Float32Array.from(values))
  }
  const q = matrix(random, 6, 5, dtype)
  const k = matrix(random, 9, 5, dtype)
  const pairs = candidatePairs(offsetsOf(history), offsetsOf(candidates))
  const dispose = () => {
    for (const x of Object.values(layer.parameters)) x.dispose()
  }
  return { layer, config, q, k, pairs, random, dispose }
}

it('pairs every candidate with every event of its request', () =>
  scope(() => {
    const { historyIds, offsets, count } = candidatePairs(offsetsOf(history), offsetsOf(candidates))
    expect(count).toBe(2 * 3 + 0 + 3 * 5)
    expect([...offsets.dataSync()].map(Number)).toEqual([0, 3, 6, 6, 11, 16, 21])
    expect([...historyIds.dataSync()].map(Number)).toEqual([
      0,
      1,
      2,
      0,
      1,
      2,
      ...[3, 4, 5, 6, 7],
      ...[3, 4, 5, 6, 7],
      ...[3, 4, 5, 6, 7],
    ])
  }))

it.each(['float32', 'float64'] as const)('is DIN on [q, k, q - k, q * k], %s', dtype => {
  const before = memory()
  scope(() => {
    const { layer, config, q, k, pairs, random, dispose } = setting(dtype)
    const values = (x: Tensor) => Array.from(x.dataSync(), Number)
    const p = Object.fromEntries(Object.entries(layer.parameters).map(([name, x]) => [name, values(x)]))
    // Any block for q - k, taken from what stands for q and k together.
    const difference = Array.from({ length: 35 }, () => random.normal())
    const blocks = {
      ...{ difference, q: p.query!.map((w, i) => w - difference[i]!) },
      ...{ k: p.key!.map((w, i) => w + difference[i]!), product: p.product! },
    }
    const out = values(layer.forward(q, k, pairs))
    const rowsOf = (x: Tensor) => Array.from({ length: x.shape[0]! }, (_, i) => values(x).slice(5 * i, 5 * i + 5))
    let m = 0
    let t = 0
    for (const [b, length] of history.entries()) {
      const events = rowsOf(k).slice(t, (t += length))
      for (const end = m + candidates[b]!; m < end; m++) {
        const expected = reference({ ...p, ...blocks }, rowsOf(q)[m]!, events, config.hidden, config.scale)
        for (let i = 0; i < 5; i++) expect(out[5 * m + i]).toBeCloseTo(expected[i]!, dtype === 'float32' ? 4 : 10)
      }
    }
    expect(m).toBe(6)
    expect(out.slice(10, 15)).toEqual([0, 0, 0, 0, 0]) // the request without history
    dispose()
  })
  expect(memory()).toEqual(before)
})

it('has the gradients of finite differences', () =>
  scope(() => {
    const { layer, q, k, pairs, random, dispose } = setting('float64')
    const labels = matrix(random, 30, 1, 'float64').view([30])
    const named: Record<string, Tensor> = { ...layer.parameters, q, k }
    const loss = () => mseLoss(reshape(layer.forward(q, k, pairs), [30]), labels)
    const { grads } = valueAndGrad(named, loss)
    for (const [name, x] of Object.entries(named)) {
      const data = x.dataSync() as Float64Array
      const gradient = grads[name]!.dataSync() as Float64Array
      for (let i = 0; i < data.length; i++) {
        const at = (value: number) => {
          x.write(data.map((x, j) => (j === i ? value : x)))
          return scope(() => loss().item())
        }
        const numeric = (at(data[i]! + 1e-5) - at(data[i]! - 1e-5)) / 2e-5
        x.write(data)
        expect(Math.abs(numeric - gradient[i]!), `d${name}[${i}]`).toBeLessThan(1e-7)
      }
    }
    expect(Object.values(grads).every(g => (g.dataSync() as Float64Array).some(x => x !== 0))).toBe(true)
    dispose()
  }))

it('without candidates or history gives nothing to add', () =>
  scope(() => {
    const { layer, k, dispose } = setting('float32')
    const none = candidatePairs(offsetsOf([9]), offsetsOf([0]))
    expect(layer.forward(Tensor.zeros([0, 5]), k, none).shape).toEqual([0, 5])
    const alone = candidatePairs(offsetsOf([0]), offsetsOf([2]))
    const out = layer.forward(Tensor.from(new Float32Array(10).fill(1), [2, 5]), Tensor.zeros([0, 5]), alone)
    expect([...out.dataSync()]).toEqual(new Array(10).fill(0))
    dispose()
  }))
