import { reshape, valueAndGrad } from '#lib/autograd.js'
import { embedding } from '#lib/ops/embedding.js'
import { linear } from '#lib/ops/linear.js'
import { mseLoss } from '#lib/ops/mse_loss.js'
import { RowwiseAdagrad } from '#lib/optim/rowwise_adagrad.js'
import { Random } from '#lib/random.js'
import { memory, scope, Tensor } from '#lib/tensor.js'

it('the gradient of looked-up rows trains as that of the whole table would', () => {
  const before = memory()
  scope(() => {
    const random = new Random(2)
    const [I, d, T] = [12, 3, 20]
    const start = Float64Array.from({ length: I * d }, () => random.normal())
    const table = Tensor.from(start, [I, d])
    const optimizer = new RowwiseAdagrad({ items: table }, { lr: 0.2 })
    // Dense: the formula on every row that has a gradient.
    const weights = start.slice()
    const sums = new Float64Array(I)
    for (let step = 0; step < 5; step++) {
      const ids = Tensor.from(BigInt64Array.from({ length: T }, () => BigInt(random.int(8))))
      const labels = Tensor.from(
        Float64Array.from({ length: T * d }, () => random.normal()),
        [T, d],
      )
      const mean = Tensor.from([1 / d, 1 / d, 1 / d], [3, 1], { dtype: 'float64' })
      const loss = (rows: Tensor) => mseLoss(rows, labels)
      const whole = Tensor.from(weights, [I, d])
      const total = (rows: Tensor) => linear(reshape(loss(rows), [1, 3]), mean)
      const dense = valueAndGrad([whole], () => total(embedding(whole, ids))).grads[0]!.dataSync() as Float64Array
      for (let i = 0; i < I; i++) {
        const g = dense.subarray(i * d, (i + 1) * d)
        if (g.every(x => x === 0)) continue
        sums[i]! += g.reduce((sum, x) => sum + x * x, 0) / d
        for (let j = 0; j < d; j++) weights[i * d + j]! -= (0.2 * g[j]!) / (Math.sqrt(sums[i]!) + 1e-8)
      }
      const rows = embedding(table, ids)
      const { grads } = valueAndGrad({ rows }, () => total(rows))
      optimizer.step({ items: { ids, rows: grads.rows } })
    }
    for (const [i, x] of (table.dataSync() as Float64Array).entries()) expect(x).toBeCloseTo(weights[i]!, 10)
    for (const [i, x] of (optimizer.accumulators.items!.dataSync() as Float64Array).entries())
      expect(x).toBeCloseTo(sums[i]!, 10)
    expect((table.dataSync() as Float64Array).slice(8 * d)).toEqual(start.slice(8 * d))
    expect(weights.slice(0, 8 * d)).not.toEqual(start.slice(0, 8 * d))
    optimizer.dispose()
  })
  expect(memory()).toEqual(before)
})

it('names a gradient of no table before it changes one', () =>
  scope(() => {
    const items = Tensor.from([1, 2], [1, 2])
    const optimizer = new RowwiseAdagrad({ items })
    const gradient = { ids: Tensor.zeros([1], { dtype: 'int64' }), rows: Tensor.from([1, 1], [1, 2]) }
    expect(() => optimizer.step({ items: gradient, users: gradient })).toThrow(/no table is named users/)
    expect([...items.dataSync()]).toEqual([1, 2])
    optimizer.step({ items: gradient })
    expect([...items.dataSync()].map(x => Number(x).toFixed(4))).toEqual(['0.9990', '1.9990'])
    optimizer.dispose()
  }))
