// The plumbing of mixed precision without a GPU: float64 stands for bfloat16 inside the model, so that parameters have one dtype and
// layers another. (Not for the scores of 'full': with a float64 query that loss wants float64 weights.)
import { afterEach, expect, it, vi } from 'vitest'
import { evaluate } from '#lib/eval/evaluate.js'
import type { ModelSpec } from '#lib/models/create.js'
import { native } from '#lib/native.js'
import { memory } from '#lib/tensor.js'
import type { TrainOptions } from '#lib/train/options.js'
import { Trainer } from '#lib/train/trainer.js'
import { events, steps, toyDataset, toyModel } from './fixture.js'

vi.mock('#lib/layers/precision.js', async original => ({
  ...(await original<typeof import('#lib/layers/precision.js')>()),
  computeDtype: (precision: string, where: { dtype?: string }) => {
    return precision === 'bf16' && !where.dtype ? 'float64' : (where.dtype ?? 'float32')
  },
}))

afterEach(() => void vi.restoreAllMocks())

const dataset = toyDataset()
const { dim, numItems, maxLength, paddedLength, inputDropout, linearDropout } = toyModel.config
const common = { dim, numItems, maxLength, paddedLength, inputDropout, linearDropout, layers: 2, heads: 2 }
const models: Record<string, ModelSpec> = {
  hstu: toyModel,
  'hstu, industrial form': { kind: 'hstu', config: { ...common, qkDim: 8, vDim: 8, affine: true, concat: true } },
  sasrec: { kind: 'sasrec', config: { ...common, ffnDim: 16 } },
  transformer: { kind: 'transformer', config: common },
}

it.each(Object.entries(models))(
  '%s computes in one dtype, with parameters and moments of another',
  async (_, model) => {
    const before = memory()
    for (const negatives of ['uniform', 'in-batch', 'full'] as const) {
      const train = async (precision: TrainOptions['precision']) => {
        const options: Partial<TrainOptions> = {
          epochs: 3,
          batchSize: 16,
          numNegatives: 8,
          seed: 3,
          clipNorm: 1,
          precision,
        }
        const trainer = new Trainer(dataset, { model, options: { ...options, negatives } })
        const [attention, cast] = [vi.spyOn(native, 'hstu_attention'), vi.spyOn(native, 'cast')]
        const list = steps(await events(trainer))
        const seen = { q: attention.mock.calls[0]![2].dtype, casts: cast.mock.calls.length }
        vi.restoreAllMocks()
        for (const group of [trainer.model.parameters, trainer.optimizer.m, trainer.optimizer.v])
          for (const tensor of Object.values(group)) expect(tensor.dtype).toBe('float32')
        const { mrr } = await evaluate(trainer.model, dataset)
        trainer.dispose()
        return { list, seen, mrr }
      }
      const [plain, mixed] = [await train('float32'), await train('bf16')]
      expect(plain.seen).toEqual({ q: 'float32', casts: 0 })
      expect(mixed.seen.q).toBe('float64')
      expect(mixed.seen.casts).toBeGreaterThan(0)
      for (const [i, [, loss, lr]] of mixed.list.entries()) {
        expect(Math.abs(loss! / plain.list[i]![1]! - 1), `${negatives} step ${i + 1}`).toBeLessThan(1e-4)
        expect(lr).toBe(plain.list[i]![2])
      }
      expect(mixed.list).toHaveLength(plain.list.length)
      expect(Math.abs(mixed.mrr - plain.mrr)).toBeLessThan(1e-3)
    }
    expect(memory()).toEqual(before)
  },
)
