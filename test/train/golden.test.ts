// golden.json: the first 20 steps of ml-100k/hstu in float64 on the CPU. Written again, where data or recipe change, by
//   HSTU_WRITE_GOLDEN=1 npx vitest run test/train/golden.test.ts
// golden.py computes the same steps in JAX and agrees to 2e-14; it begins from what HSTU_GOLDEN_INPUTS=<file> makes this test write.
import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { beforeAll, describe, expect, it } from 'vitest'
import type { SequenceDataset } from '#lib/data/dataset.js'
import { createModel } from '#lib/models/create.js'
import { native } from '#lib/native.js'
import { dropout } from '#lib/ops/dropout.js'
import { randomIds } from '#lib/ops/random_ids.js'
import { type Device, scope, Tensor } from '#lib/tensor.js'
import { preset } from '#lib/train/presets.js'
import { hashOf, ml100k, type Step, traceInputs, traceOf } from './trace.js'

interface Golden {
  preset: string
  seed: number
  data: { users: number; items: number; actions: number; sha256: string }
  steps: Step[]
}

const file = new URL('golden.json', import.meta.url)
const golden = () => JSON.parse(readFileSync(file, 'utf8')) as Golden
const data = join(process.env.HSTU_DATA ?? '', 'ml-100k/ml-100k.inter')
const hasData = process.env.HSTU_DATA !== undefined && existsSync(data)
if (!hasData) console.warn('golden trace NOT CHECKED: set HSTU_DATA to the folder that has ml-100k/ml-100k.inter')
const { usable, reason } = native.backend().cuda
const onCuda = usable ? it : (name: string, _: () => unknown) => it.skip(`${name}: NOT RUN (${reason})`, () => {})

/** Relative errors allowed. Float32 keeps 24 bits; measured over the 20 steps on the CPU: 5e-8, 2e-7 and 1.1e-6. */
interface Tolerance {
  loss: number
  norm: number
  each: number
}
const float64: Tolerance = { loss: 1e-10, norm: 1e-9, each: 1e-8 }
const float32: Tolerance = { loss: 1e-6, norm: 1e-5, each: 5e-5 }

const relative = (actual: number, expected: number) => Math.abs(actual / expected - 1)

function expectTrace(actual: Step[], expected: Step[], tolerance: Tolerance): void {
  expect(actual.length).toBe(expected.length)
  expected.forEach((step, i) => {
    const at = (what: string) => `${what} of step ${i + 1}`
    expect(relative(actual[i]!.loss, step.loss), at('loss')).toBeLessThan(tolerance.loss)
    expect(relative(actual[i]!.norm, step.norm), at('gradient norm')).toBeLessThan(tolerance.norm)
    expect(Object.keys(actual[i]!.norms)).toEqual(Object.keys(step.norms))
    for (const [name, norm] of Object.entries(step.norms))
      expect(relative(actual[i]!.norms[name]!, norm), at(`norm of the gradient of ${name}`)).toBeLessThan(
        tolerance.each,
      )
  })
}

describe.skipIf(!hasData)('golden trace of ml-100k/hstu', () => {
  let dataset: SequenceDataset
  beforeAll(async () => {
    dataset = await ml100k(data)
    const inputs = process.env.HSTU_GOLDEN_INPUTS
    if (inputs) writeFileSync(inputs, JSON.stringify(traceInputs(dataset, 20)))
    if (!process.env.HSTU_WRITE_GOLDEN) return
    const { numUsers: users, numItems: items } = dataset
    const about = { users, items, actions: dataset.items.length, sha256: hashOf(dataset) }
    const steps = await traceOf(dataset, { dtype: 'float64' }, 20)
    const content: Golden = { preset: 'ml-100k/hstu', seed: 0, data: about, steps }
    writeFileSync(file, `${JSON.stringify(content, null, 2)}\n`)
  })

  it('is of this data', () => {
    const { users, items, actions, sha256 } = golden().data
    expect([dataset.numUsers, dataset.numItems, dataset.items.length]).toEqual([users, items, actions])
    expect(hashOf(dataset)).toBe(sha256)
  })

  it('holds for float64 on the CPU', async () => {
    expectTrace(await traceOf(dataset, { dtype: 'float64' }, 20), golden().steps, float64)
  })

  it('holds for float32 on the CPU', async () => {
    expectTrace(await traceOf(dataset, {}, 20), golden().steps, float32)
  })

  for (const graphs of [true, false]) {
    const how = graphs ? 'as graphs' : 'op by op'
    onCuda(`holds for float32 on CUDA, ${how}`, async () => {
      expectTrace(await traceOf(dataset, { device: 'cuda' }, 20, graphs), golden().steps, float32)
    })

    onCuda(`CPU and CUDA float32 agree to 1e-4 in the loss of every one of 50 steps, ${how}`, async () => {
      const cpu = await traceOf(dataset, {}, 50)
      const cuda = await traceOf(dataset, { device: 'cuda' }, 50, graphs)
      const errors = cuda.map(({ loss }, i) => relative(loss, cpu[i]!.loss))
      console.log(`CPU and CUDA, ${how}, over 50 steps: largest relative difference of the loss ${Math.max(...errors)}`)
      expect(Math.max(...errors)).toBeLessThan(1e-4)
    })
  }

  // Then only the rounding of sums is left to differ.
  onCuda('CPU and CUDA start from the same bits and draw the same dropouts and negatives', () => {
    const spec = preset('ml-100k/hstu').model(dataset.numItems)
    const on = (device: Device) =>
      scope(() => {
        const model = createModel(spec, 0, { device })
        const weights = Object.entries(model.parameters).map(([name, tensor]) => [name, tensor.dataSync()] as const)
        model.dispose()
        const ones = Tensor.from(new Float32Array(20_000 * 50).fill(1), [20_000, 50], { device })
        const position = { seed: 0n, offset: 12_345n }
        const kept = (dropout(ones, 0.2, position).dataSync() as Float32Array).map(Math.sign)
        const ids = randomIds([20_000, 128], { low: 1, high: dataset.numItems + 1, ...position, device }).dataSync()
        return [...weights, ['dropout', kept] as const, ['negatives', ids] as const]
      })
    const cpu = on('cpu')
    for (const [i, [name, values]] of on('cuda').entries())
      expect(Buffer.from(values.buffer).equals(Buffer.from(cpu[i]![1].buffer)), name).toBe(true)
  })
})
