import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, it } from 'vitest'
import { evaluate } from '#lib/eval/evaluate.js'
import { recommend } from '#lib/eval/recommend.js'
import { native } from '#lib/native.js'
import { memory } from '#lib/tensor.js'
import { saveCheckpoint } from '#lib/train/checkpoint.js'
import { checkVocabulary, loadModel } from '#lib/train/model_checkpoint.js'
import type { TrainOptions } from '#lib/train/options.js'
import { trainOptions } from '#lib/train/options.js'
import { preset, presetNames } from '#lib/train/presets.js'
import { Trainer } from '#lib/train/trainer.js'
import { bits, events, steps, toyDataset, toyModel } from './fixture.js'

const root = mkdtempSync(join(tmpdir(), 'hstu-trainer-'))
afterAll(() => rmSync(root, { recursive: true, force: true }))
const folder = (name: string) => join(root, name)

const dataset = toyDataset()
const options: Partial<TrainOptions> = {
  epochs: 4,
  batchSize: 16,
  numNegatives: 8,
  evaluateEvery: 2,
  seed: 3,
  clipNorm: 1,
  warmupSteps: 3,
  schedule: 'cosine',
}

describe('Trainer', () => {
  it('learns, evaluates, keeps the best epoch, and frees what it made', async () => {
    const before = memory()
    const trainer = new Trainer(dataset, {
      model: toyModel,
      options: { ...options, epochs: 40, lr: 5e-3, evaluateEvery: 5 },
    })
    const list = await events(trainer)
    const losses = steps(list).map(step => step[1]!)
    expect(losses.at(-1)!).toBeLessThan(losses[0]! * 0.8)
    const done = list.at(-1)!
    if (done.type !== 'done') throw new Error('the last event is done')
    const again = await evaluate(trainer.model, dataset, { stage: 'valid' })
    expect(again).toEqual(done.best!.metrics)
    expect(again['hr@10']).toBeGreaterThan(0.6)
    trainer.dispose()
    expect(memory()).toEqual(before)
  })

  it('repeats a seed bit for bit, with any number of threads', async () => {
    const run = async (threads: number, seed: number) => {
      native.set_num_threads(threads)
      const trainer = new Trainer(dataset, { model: toyModel, options: { ...options, seed } })
      await events(trainer)
      const result = bits(trainer)
      trainer.dispose()
      return result
    }
    try {
      const first = await run(1, 3)
      expect(await run(3, 3)).toEqual(first)
      expect(await run(2, 4)).not.toEqual(first)
    } finally {
      native.set_num_threads(0)
    }
  })

  it.each([1, 3, 6, 7, 11])(
    'interrupted at step %i and resumed, ends with the bits of an uninterrupted run',
    async stop => {
      const whole = new Trainer(dataset, { model: toyModel, options })
      const expected = await events(whole)
      const out = folder(`resume-${stop}`)
      const first = new Trainer(dataset, { model: toyModel, options, folder: out })
      const part = await events(first, stop)
      expect(part.at(-1)).toEqual({ type: 'interrupted', step: stop, folder: out })
      const second = await Trainer.resume(out, dataset)
      const rest = await events(second)
      expect([...steps(part), ...steps(rest)]).toEqual(steps(expected))
      expect(bits(second)).toEqual(bits(whole))
      expect(second.state.history).toEqual(whole.state.history)
      expect(second.state.best).toEqual(whole.state.best)
      for (const trainer of [whole, first, second]) trainer.dispose()
    },
  )

  it('stops early when validation no longer improves', async () => {
    const trainer = new Trainer(dataset, {
      model: toyModel,
      options: { ...options, epochs: 200, evaluateEvery: 1, patience: 2, lr: 0.05 },
    })
    const done = (await events(trainer)).at(-1)!
    expect(done).toMatchObject({ type: 'done', stoppedEarly: true })
    expect(trainer.state.epoch).toBe(trainer.state.best!.epoch + 2)
    trainer.dispose()
  })

  it.each([
    { negatives: 'full' },
    { negatives: 'in-batch' },
    { part: 'paper' },
    { part: 'all' },
  ] as Partial<TrainOptions>[])('trains with %o', async extra => {
    const trainer = new Trainer(dataset, { model: toyModel, options: { ...options, ...extra } })
    const list = await events(trainer)
    expect(list.some(event => event.type === 'evaluation')).toBe(extra.part !== 'all')
    const losses = steps(list).map(step => step[1]!)
    expect(losses.at(-1)!).toBeLessThan(losses[0]!)
    trainer.dispose()
  })

  it('saves a model that evaluates and recommends the same', async () => {
    const out = folder('best')
    const trainer = new Trainer(dataset, { model: toyModel, options, folder: out })
    await events(trainer)
    const loaded = await loadModel(join(out, 'best'))
    checkVocabulary(loaded, dataset)
    expect(await evaluate(loaded.model, dataset)).toEqual(await evaluate(trainer.model, dataset))
    expect(recommend(loaded.model, dataset, [0, 5], { k: 3 })).toEqual(
      recommend(trainer.model, dataset, [0, 5], { k: 3 }),
    )
    expect(loaded.origin.metrics).toEqual(trainer.state.best!.metrics)
    const other = { ...dataset, itemIds: dataset.itemIds.map((id, i) => (i === 7 ? 'x' : id)) }
    expect(() => checkVocabulary(loaded, other)).toThrow(/item 7 is 'x' here and 'i7' in the model/)
    await expect(loadModel(join(out, 'checkpoint'))).rejects.toThrow(/'training' checkpoint, not a model/)
    loaded.model.dispose()
    trainer.dispose()
  })

  it('goes on after early stopping when patience is raised, and never saves the best model as its last step', async () => {
    const out = folder('patience')
    const early = { ...options, epochs: 30, evaluateEvery: 1, patience: 1, lr: 0.05 }
    const trainer = new Trainer(dataset, { model: toyModel, options: early, folder: out })
    await events(trainer)
    const stopped = trainer.state.epoch
    expect(stopped).toBeLessThan(30)
    await expect(trainer.save()).rejects.toMatchObject({ code: 'ERR_HSTU_INVALID_ARGUMENT' })
    const more = await Trainer.resume(out, dataset, { patience: 0 })
    await events(more)
    expect(more.state.epoch).toBe(30)
    for (const each of [trainer, more]) each.dispose()
  })

  it('types what a well-hashed manifest of the wrong content throws', async () => {
    const out = folder('forged')
    const before = memory()
    const content = { kind: 'training', tensors: { model: {} }, json: { model: toyModel, options: {}, state: null } }
    await saveCheckpoint(join(out, 'checkpoint'), 1, content)
    await expect(Trainer.resume(out, dataset)).rejects.toMatchObject({ code: 'ERR_HSTU_CHECKPOINT' })
    await saveCheckpoint(join(out, 'best'), 1, { kind: 'model', tensors: { model: {} }, json: {} })
    await expect(loadModel(join(out, 'best'))).rejects.toMatchObject({ code: 'ERR_HSTU_CHECKPOINT' })
    expect(memory()).toEqual(before)
  })

  it('refuses to resume on other data, and bad options', async () => {
    const out = folder('other')
    const trainer = new Trainer(dataset, { model: toyModel, options, folder: out })
    await events(trainer, 2)
    trainer.dispose()
    const before = memory()
    await expect(Trainer.resume(out, toyDataset(40, 20, 2))).rejects.toMatchObject({ code: 'ERR_HSTU_CHECKPOINT' })
    await expect(Trainer.resume(folder('none'), dataset)).rejects.toMatchObject({ code: 'ERR_HSTU_CHECKPOINT' })
    expect(memory()).toEqual(before)
    expect(() => trainOptions({ lr: -1 })).toThrow(/lr must be a positive number, got -1/)
    expect(() => trainOptions({ part: 'half' as never })).toThrow(/part must be one of valid, paper, all, got "half"/)
    expect(() => trainOptions({ epoch: 3 } as never)).toThrow(/unknown training option 'epoch'. Options: epochs/)
    expect(() => preset('ml-100k/gru')).toThrow(/unknown preset 'ml-100k\/gru'. Presets: ml-100k\/sasrec/)
    for (const name of presetNames) expect(trainOptions(preset(name).train)).toBeTruthy()
  })
})
