// The padded step on the CPU, where it runs op by op; test/native/step_graphs.test.ts has it as graphs.
import { describe, expect, it } from 'vitest'
import { valueAndGrad } from '#lib/autograd.js'
import { trainBatch } from '#lib/data/batch.js'
import { toInputs, toTargets } from '#lib/data/inputs.js'
import { nextItemLoss } from '#lib/losses/next_item.js'
import { createModel } from '#lib/models/create.js'
import { Philox } from '#lib/philox.js'
import { memory, scope } from '#lib/tensor.js'
import { trainOptions } from '#lib/train/options.js'
import { PaddedBatch, paddedShape, StepGraphs } from '#lib/train/step_graphs.js'
import { Trainer } from '#lib/train/trainer.js'
import { toyDataset, toyModel } from './fixture.js'

describe('paddedShape', () => {
  it('adds at most an eighth or 63 rows, and room for them in sequences', () => {
    for (const maxLength of [1, 10, 200])
      for (let tokens = 1; tokens < 5000; tokens++) {
        const { rows, sequences } = paddedShape(tokens, 7, maxLength)
        const added = rows - tokens
        expect(added).toBeGreaterThanOrEqual(0)
        expect(added).toBeLessThan(Math.max(64, tokens / 8))
        expect((sequences - 7) * maxLength).toBeGreaterThanOrEqual(added)
      }
  })

  it('has at most eight shapes an octave', () => {
    const shapes = new Set(Array.from({ length: 8192 }, (_, i) => paddedShape(8193 + i, 128, 200).rows))
    expect([...shapes]).toEqual(Array.from({ length: 8 }, (_, i) => 8192 + 1024 * (i + 1)))
  })
})

describe('PaddedBatch', () => {
  const dataset = toyDataset()
  const batchOf = (users: number[]) => trainBatch(dataset, users, { maxLength: 10, protocol: 'all' })

  it('holds the batch and sequences of padding behind it, whatever it held before', () => {
    const shape = { rows: 64, sequences: 12 }
    const padded = new PaddedBatch(shape, 10, true, 3)
    for (const users of [[1, 2, 3, 4, 5], [7], [9, 8, 7, 6]]) {
      const batch = batchOf(users)
      padded.fill(batch)
      const { fields, weights } = padded
      const tokens = batch.ids.length
      for (const name of ['ids', 'targets', 'times', 'queryTimes'] as const) {
        expect([...fields[name].subarray(0, tokens)]).toEqual([...batch[name]!])
        expect(new Set(fields[name].subarray(tokens))).toEqual(new Set([0n]))
      }
      expect([...weights]).toEqual(Array.from({ length: 64 }, (_, t) => Number(t < tokens)))
      const offsets = [...fields.offsets].map(Number)
      expect(offsets).toHaveLength(13)
      expect(offsets.slice(0, users.length + 1)).toEqual([...batch.offsets].map(Number))
      expect(offsets.at(-1)).toBe(64)
      for (let s = 0; s < 12; s++) {
        expect(offsets[s + 1]! - offsets[s]!).toBeGreaterThanOrEqual(0)
        expect(offsets[s + 1]! - offsets[s]!).toBeLessThanOrEqual(10)
      }
    }
  })
})

describe('StepGraphs', () => {
  it.each(['uniform', 'full'] as const)('gives the loss and gradients of the batch, %s', negatives => {
    const before = memory()
    const dataset = toyDataset()
    const tensors = { dtype: 'float64' } as const
    const options = trainOptions({ numNegatives: 8, batchSize: 8, negatives })
    const model = createModel(toyModel, 1, tensors)
    const steps = new StepGraphs(model, options)
    const [there, here] = [new Philox(5n), new Philox(5n)]
    for (const count of [8, 5, 8, 20, 8]) {
      const batch = trainBatch(
        dataset,
        Int32Array.from({ length: count }, (_, i) => i),
        { maxLength: 10 },
      )
      scope(() => {
        const inputs = toInputs(batch, tensors)
        const { targets, weights } = toTargets(batch, tensors)
        const expected = valueAndGrad(model.parameters, () => {
          const output = model.forward(inputs, there)
          return nextItemLoss(output, model.parameters.items!, targets, weights, there, options)
        })
        const actual = steps.run(batch, here)!
        expect(here.offset).toBe(there.offset)
        expect(Math.abs(actual.value.item() / expected.value.item() - 1)).toBeLessThan(1e-12)
        for (const [name, grad] of Object.entries(expected.grads)) {
          const [wanted, found] = [grad.dataSync() as Float64Array, actual.grads[name]!.dataSync() as Float64Array]
          const norm = Math.hypot(...wanted)
          expect(norm, name).toBeGreaterThan(0)
          expect(Math.hypot(...wanted.map((x, i) => x - found[i]!)) / norm, name).toBeLessThan(1e-12)
        }
      })
    }
    steps.dispose()
    model.dispose()
    expect(memory()).toEqual(before)
  })

  it('is of HSTU on CUDA alone, and an option', () => {
    const model = createModel(toyModel, 1)
    const onCuda = (kind: string) => ({ kind, parameters: { items: { device: 'cuda:0' } } }) as never
    const supports = (of: never, changes = {}) => StepGraphs.supports(of, trainOptions(changes))
    expect(supports(onCuda('hstu'))).toBe(true)
    expect(supports(onCuda('hstu'), { cudaGraphs: false })).toBe(false)
    expect(supports(onCuda('hstu'), { negatives: 'in-batch' })).toBe(false)
    expect(supports(onCuda('sasrec'))).toBe(false)
    expect(supports(model as never)).toBe(false)
    model.dispose()
    expect(() => trainOptions({ cudaGraphs: 1 as never })).toThrow(/cudaGraphs must be true or false, got 1/)
    const make = (cudaGraphs: boolean) => new Trainer(toyDataset(), { model: toyModel, options: { cudaGraphs } })
    const trainers = [make(true), make(false)]
    expect(trainers.map(trainer => trainer.options.cudaGraphs)).toEqual([true, false])
    for (const trainer of trainers) trainer.dispose()
  })
})
