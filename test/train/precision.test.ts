// precision 'bf16': refused where it cannot be, and on CUDA near to float32.
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, it } from 'vitest'
import { evaluate } from '#lib/eval/evaluate.js'
import { nextItemLoss } from '#lib/losses/next_item.js'
import { createModel, type ModelSpec } from '#lib/models/create.js'
import { native } from '#lib/native.js'
import { Philox } from '#lib/philox.js'
import { memory, scope, Tensor } from '#lib/tensor.js'
import { saveCheckpoint } from '#lib/train/checkpoint.js'
import { loadModel, modelContent } from '#lib/train/model_checkpoint.js'
import { type TrainOptions, trainOptions } from '#lib/train/options.js'
import { Trainer } from '#lib/train/trainer.js'
import { bits, events, steps, toyDataset, toyModel } from './fixture.js'

const root = mkdtempSync(join(tmpdir(), 'hstu-precision-'))
afterAll(() => rmSync(root, { recursive: true, force: true }))

const dataset = toyDataset()
const options: Partial<TrainOptions> = {
  epochs: 4,
  batchSize: 16,
  numNegatives: 8,
  evaluateEvery: 2,
  seed: 3,
  clipNorm: 1,
}
const { dim, numItems, maxLength, paddedLength, inputDropout, linearDropout } = toyModel.config
const common = { dim, numItems, maxLength, paddedLength, inputDropout, linearDropout, layers: 2, heads: 2 }
const models: ModelSpec[] = [
  toyModel,
  { kind: 'sasrec', config: { ...common, ffnDim: 16 } },
  { kind: 'transformer', config: common },
]

describe('on the CPU', () => {
  it('bf16 is refused, by name, and leaves nothing behind', () => {
    const before = memory()
    const refusal = expect.objectContaining({
      code: 'ERR_HSTU_INVALID_ARGUMENT',
      message: expect.stringMatching(/precision 'bf16' computes on CUDA alone, the device here is 'cpu'/),
    })
    for (const model of models) {
      expect(() => createModel(model, 1, { precision: 'bf16' })).toThrow(refusal)
      expect(() => new Trainer(dataset, { model, options: { ...options, precision: 'bf16' } })).toThrow(refusal)
    }
    scope(() => {
      const [x, ids] = [Tensor.zeros([2, 3]), Tensor.from(BigInt64Array.of(1n, 2n))]
      const full = { negatives: 'full', precision: 'bf16' } as const
      expect(() => nextItemLoss(x, Tensor.zeros([4, 3]), ids, Tensor.from([1, 1]), new Philox(1n), full)).toThrow(
        refusal,
      )
    })
    expect(memory()).toEqual(before)
    expect(() => trainOptions({ precision: 'fp8' as never })).toThrow(
      /precision must be one of float32, bf16, got "fp8"/,
    )
    expect(trainOptions({}).precision).toBe('float32')
  })

  it('a model that was trained in bf16 on CUDA loads, and computes in float32', async () => {
    const model = createModel(toyModel, 1)
    const origin = { options: trainOptions({ ...options, precision: 'bf16' }), epoch: 1, metrics: null }
    const content = modelContent(model, toyModel, dataset, origin)
    const json = { ...content.json, tensors: { device: 'cuda:0', precision: 'bf16' } }
    await saveCheckpoint(join(root, 'best'), 1, { ...content, json })
    const loaded = await loadModel(join(root, 'best'), { device: 'cpu' })
    expect(loaded.model.options).toEqual({ device: 'cpu', precision: 'float32' })
    expect(await evaluate(loaded.model, dataset)).toEqual(await evaluate(model, dataset))
    for (const each of [model, loaded.model]) each.dispose()
  })
})

describe.skipIf(!native.backend().cuda.usable)('on CUDA', () => {
  const tensors = { device: 'cuda' } as const
  const make = (model: ModelSpec, extra: Partial<TrainOptions>, folder?: string) =>
    new Trainer(dataset, { model, options: { ...options, ...extra }, tensors, ...(folder ? { folder } : {}) })

  it.each(models)('$kind trains in bf16 as in float32, with float32 parameters and moments', async model => {
    for (const negatives of ['uniform', 'in-batch', 'full'] as const) {
      const [single, half] = [make(model, { negatives }), make(model, { negatives, precision: 'bf16' })]
      const expected = steps(await events(single))
      const actual = steps(await events(half))
      expect(actual).toHaveLength(expected.length)
      for (const [i, [, loss]] of actual.entries())
        expect(Math.abs(loss! / expected[i]![1]! - 1), `${negatives} step ${i + 1}`).toBeLessThan(0.03)
      expect(actual).not.toEqual(expected)
      for (const group of [half.model.parameters, half.optimizer.m, half.optimizer.v])
        for (const tensor of Object.values(group)) expect(tensor.dtype).toBe('float32')
      for (const trainer of [single, half]) trainer.dispose()
    }
  })

  it('repeats its bits and resumes exactly; its model evaluates the same on CUDA, and nearly so on the CPU', async () => {
    const out = join(root, 'run')
    const [whole, first] = [make(toyModel, { precision: 'bf16' }), make(toyModel, { precision: 'bf16' }, out)]
    const expected = await events(whole)
    await events(first, 5)
    const second = await Trainer.resume(out, dataset)
    expect(second.options.precision).toBe('bf16')
    await events(second)
    expect(bits(second)).toEqual(bits(whole))
    expect(second.state.history).toEqual(whole.state.history)
    expect(expected.at(-1)).toMatchObject({ type: 'done' })
    const [here, there] = [
      await loadModel(join(out, 'best'), tensors),
      await loadModel(join(out, 'best'), { device: 'cpu' }),
    ]
    expect(there.model.options.precision).toBe('float32')
    const metrics = await evaluate(second.model, dataset)
    expect(await evaluate(here.model, dataset)).toEqual(metrics)
    expect(Math.abs((await evaluate(there.model, dataset)).mrr - metrics.mrr)).toBeLessThan(0.05)
    for (const { model } of [here, there]) model.dispose()
    for (const trainer of [whole, first, second]) trainer.dispose()
  })
})
