// Steps that are enqueued before the losses of earlier ones are read, and steps that fail on the way.
import { createHash } from 'node:crypto'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, afterEach, describe, expect, it, vi } from 'vitest'
import { HstuError } from '#lib/errors.js'
import { native } from '#lib/native.js'
import { memory, Tensor, type TensorOptions } from '#lib/tensor.js'
import { loadCheckpoint } from '#lib/train/checkpoint.js'
import type { TrainOptions } from '#lib/train/options.js'
import { type TrainEvent, Trainer } from '#lib/train/trainer.js'
import { bits, events, steps, toyDataset, toyModel } from './fixture.js'

const root = mkdtempSync(join(tmpdir(), 'hstu-in-flight-'))
afterAll(() => rmSync(root, { recursive: true, force: true }))
afterEach(() => void vi.restoreAllMocks())

const dataset = toyDataset()
const options: Partial<TrainOptions> = {
  epochs: 4,
  batchSize: 8,
  numNegatives: 8,
  evaluateEvery: 2,
  seed: 3,
  clipNorm: 1,
}
const { usable } = native.backend().cuda

const make = (extra: Partial<TrainOptions> = {}, folder?: string, tensors: TensorOptions = {}) =>
  new Trainer(dataset, { model: toyModel, options: { ...options, ...extra }, tensors, ...(folder ? { folder } : {}) })

/** A trainer on the CPU that lags as on CUDA: values arrive some turns late, later ones sooner. */
function lagging(trainer: Trainer): Trainer {
  Object.assign(trainer, { lag: 2 })
  let call = 0
  vi.spyOn(Tensor.prototype, 'data').mockImplementation(async function (this: Tensor) {
    const data = this.dataSync()
    for (let turn = 6 - 2 * (call++ % 3); turn > 0; turn--) await new Promise(resolve => setImmediate(resolve))
    return data
  })
  return trainer
}

describe('a lagging run', () => {
  it('tells of every step once and in order, at most two steps late, and trains the same bits', async () => {
    const [plain, late] = [make(), lagging(make())]
    const expected = await events(plain)
    const told: TrainEvent[] = []
    const ahead: number[] = []
    for await (const event of late.run()) {
      told.push(event)
      if (event.type === 'step') ahead.push(late.state.step - event.step)
      else expect(steps(told)).toHaveLength(late.state.step) // all losses are in
    }
    expect(Math.max(...ahead)).toBe(2)
    expect(steps(told)).toEqual(steps(expected))
    expect(told.map(event => event.type)).toEqual(expected.map(event => event.type))
    expect(bits(late)).toEqual(bits(plain))
    expect(late.state.history).toEqual(plain.state.history)
    for (const trainer of [plain, late]) trainer.dispose()
  })

  it('does not lag on the CPU: the loss of a step is in the state when its event is told', async () => {
    const trainer = make()
    let sum = 0
    for await (const event of trainer.run()) {
      if (event.type === 'evaluation') break
      if (event.type !== 'step') continue
      expect(trainer.state.step).toBe(event.step)
      sum = (event.step - 1) % trainer.stepsPerEpoch === 0 ? event.loss : sum + event.loss
      expect(trainer.state.lossSum).toBe(sum)
    }
    trainer.dispose()
  })

  it.each([1, 4, 7])(
    'interrupted at the event of step %i and resumed, ends with the bits of a whole run',
    async stop => {
      const whole = make()
      const expected = await events(whole)
      const out = join(root, `interrupted-${stop}`)
      const first = lagging(make({}, out))
      const part = await events(first, stop)
      expect(part.at(-1)).toEqual({ type: 'interrupted', step: first.state.step, folder: out })
      expect(first.state.step).toBeLessThanOrEqual(stop + 2)
      expect(steps(part)).toHaveLength(first.state.step)
      const second = lagging(await Trainer.resume(out, dataset))
      const rest = await events(second)
      expect([...steps(part), ...steps(rest)]).toEqual(steps(expected))
      expect(bits(second)).toEqual(bits(whole))
      expect(second.state.history).toEqual(whole.state.history)
      for (const trainer of [whole, first, second]) trainer.dispose()
    },
  )

  it('saves, when asked between two events, with the losses of all steps that were made', async () => {
    const whole = make()
    const losses = steps(await events(whole)).map(step => step[1]!)
    const out = join(root, 'asked')
    const trainer = lagging(make({}, out))
    for await (const event of trainer.run())
      if (event.type === 'step' && event.step === 2) {
        expect(trainer.state.step).toBe(4)
        await trainer.save()
        break
      }
    const { state } = (await loadCheckpoint(join(out, 'checkpoint'))).json as unknown as Pick<Trainer, 'state'>
    expect(state).toMatchObject({ step: 4, batch: 4, lossSum: losses.slice(0, 4).reduce((sum, loss) => sum + loss, 0) })
    const rest = await Trainer.resume(out, dataset)
    await events(rest)
    expect(bits(rest)).toEqual(bits(whole))
    expect(rest.state.history).toEqual(whole.state.history)
    for (const each of [whole, trainer, rest]) each.dispose()
  })

  it('names the step whose loss is not finite, and saves nothing after it', async () => {
    const huge = { lr: 1e300, clipNorm: 0 }
    const message = /loss became NaN at step 2: lower lr or set clipNorm/
    const plain = make(huge)
    await expect(events(plain)).rejects.toThrow(message)
    const out = join(root, 'nan')
    const late = lagging(make({ ...huge, checkpointEvery: 3 }, out))
    await expect(events(late)).rejects.toThrow(message)
    await expect(late.save()).rejects.toThrow(message)
    expect((await loadCheckpoint(join(out, 'checkpoint'))).step).toBe(0)
    for (const trainer of [plain, late]) trainer.dispose()
  })
})

/** Lets call number `at` of all that may allocate fail; returns how many calls there were so far. */
function failAt(at: number): () => number {
  let calls = 0
  const addon = native as unknown as Record<string, (...args: unknown[]) => unknown>
  for (const name of ['create', ...Object.keys(native.signatures)]) {
    const call = addon[name]!
    vi.spyOn(addon, name).mockImplementation((...args) => {
      if (++calls === at) throw new HstuError('ERR_HSTU_OUT_OF_MEMORY', `out of memory in ${name}`)
      return call(...args)
    })
  }
  return () => calls
}

function digest(trainer: Trainer): string {
  const hash = createHash('sha256')
  for (const [name, data] of bits(trainer)) hash.update(name).update(data)
  return hash.digest('hex')
}

describe('a step that runs out of memory', () => {
  const users = Int32Array.from({ length: dataset.numUsers }, (_, user) => user)

  it('changes nothing, wherever it fails', async () => {
    const [plain, trainer] = [make(), make()]
    for (const each of [plain, trainer]) await each.step(users).loss
    const [before, held, state] = [digest(trainer), memory(), { ...trainer.state }]
    const calls = failAt(Infinity)
    await plain.step(users).loss
    vi.restoreAllMocks()
    for (let at = 1; at <= calls(); at++) {
      failAt(at)
      const size =
        'step 2 \\(40 users, \\d+ tokens\\) was abandoned, nothing has changed; lower batchSize: out of memory in'
      expect(() => trainer.step(users), `call ${at}`).toThrow(
        expect.objectContaining({ code: 'ERR_HSTU_OUT_OF_MEMORY', message: expect.stringMatching(size) }),
      )
      vi.restoreAllMocks()
      expect(memory()).toEqual(held)
      expect(trainer.state).toEqual(state)
      expect(trainer.optimizer.steps).toBe(1)
      expect(digest(trainer)).toBe(before)
    }
    await trainer.step(users).loss
    expect(bits(trainer)).toEqual(bits(plain))
    for (const each of [plain, trainer]) each.dispose()
  })

  it('lets training go on, with a smaller batch or, by run(), with the same one', async () => {
    const whole = make()
    await events(whole)
    const trainer = lagging(make())
    const seen: number[] = []
    const run = async () => {
      for await (const event of trainer.run()) {
        if (event.type === 'step') seen.push(event.step)
        if (trainer.state.step === 4 && seen.length === 2) failAt(50)
      }
    }
    await expect(run()).rejects.toMatchObject({
      code: 'ERR_HSTU_OUT_OF_MEMORY',
      message: expect.stringMatching(/^step 5 /),
    })
    vi.restoreAllMocks()
    expect(seen).toEqual([1, 2, 3, 4])
    await run()
    expect(seen).toEqual(Array.from({ length: whole.state.step }, (_, i) => i + 1))
    expect(bits(trainer)).toEqual(bits(whole))
    expect(trainer.state.history).toEqual(whole.state.history)
    expect(await trainer.step(users.subarray(0, 4)).loss).toBeGreaterThan(0)
    for (const each of [whole, trainer]) each.dispose()
  })
})

describe.skipIf(!usable)('on CUDA', () => {
  const cuda = { device: 'cuda' } as const

  it('lags by at most two steps, repeats its bits, and resumes exactly', async () => {
    const whole = make({}, undefined, cuda)
    const expected = await events(whole)
    const again = make({}, undefined, cuda)
    const ahead: number[] = []
    for await (const event of again.run()) if (event.type === 'step') ahead.push(again.state.step - event.step)
    expect(Math.max(...ahead)).toBe(2)
    expect(bits(again)).toEqual(bits(whole))
    const out = join(root, 'cuda')
    const first = make({}, out, cuda)
    const part = await events(first, 6)
    const second = await Trainer.resume(out, dataset)
    const rest = await events(second)
    expect([...steps(part), ...steps(rest)]).toEqual(steps(expected))
    expect(bits(second)).toEqual(bits(whole))
    expect(second.state.history).toEqual(whole.state.history)
    for (const trainer of [whole, again, first, second]) trainer.dispose()
  })

  it.each([
    ['op by op', false],
    ['as graphs, which are given up', true],
  ])('abandons a step that does not fit, and goes on with a smaller one: %s', async (_, cudaGraphs) => {
    const many = toyDataset(4000, 20)
    const users = Int32Array.from({ length: many.numUsers }, (_, user) => user)
    const config = { ...toyModel.config, dim: 256, heads: 4, qkDim: 64, vDim: 64 }
    const train = () =>
      new Trainer(many, {
        model: { ...toyModel, config } as typeof toyModel,
        options: { ...options, numNegatives: 512, cudaGraphs },
        tensors: cuda,
      })
    const first = memory()
    const [plain, trainer] = [train(), train()]
    for (const each of [plain, trainer]) await each.step(users.subarray(0, 4)).loss
    const hashed = (of: Trainer) =>
      bits(of).map(([name, data]) => [name, createHash('sha256').update(data).digest('hex')])
    const before = hashed(trainer)
    const hogs: Tensor[] = []
    for (let bytes = 2 ** 37; bytes >= 2 ** 20; bytes /= 2)
      try {
        for (;;) hogs.push(Tensor.empty([bytes / 4], cuda))
      } catch (error) {
        expect(error).toMatchObject({ code: 'ERR_HSTU_OUT_OF_MEMORY' })
      }
    const full = memory()
    try {
      expect(() => trainer.step(users)).toThrow(expect.objectContaining({ code: 'ERR_HSTU_OUT_OF_MEMORY' }))
      if (!cudaGraphs) expect(memory()).toEqual(full)
      expect(memory().bytes).toBeLessThanOrEqual(full.bytes)
    } finally {
      for (const hog of hogs) hog.dispose()
    }
    expect(hashed(trainer)).toEqual(before)
    expect(trainer.state.step).toBe(1)
    const [expected, loss] = await Promise.all([plain, trainer].map(each => each.step(users.subarray(0, 100)).loss))
    if (!cudaGraphs) expect(hashed(trainer)).toEqual(hashed(plain)) // sums over padded rows are split elsewhere
    expect(Math.abs(loss! / expected! - 1)).toBeLessThan(1e-4)
    for (const each of [plain, trainer]) each.dispose()
    expect(memory()).toEqual(first)
  })
})
