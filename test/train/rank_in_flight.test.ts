// Ranking steps that are enqueued before losses and predictions of earlier ones are read, and steps that fail on the way.
import { afterEach, beforeAll, describe, expect, it, vi } from 'vitest'
import { rankerBatch } from '#lib/data/ranking/ranker_inputs.js'
import type { RequestReader } from '#lib/data/ranking/reader.js'
import { taskTargets } from '#lib/data/ranking/tasks.js'
import { HstuError } from '#lib/errors.js'
import { native } from '#lib/native.js'
import { Philox } from '#lib/philox.js'
import { memory, scope, Tensor } from '#lib/tensor.js'
import { loadCheckpoint } from '#lib/train/checkpoint.js'
import { RankFeed } from '#lib/train/rank_feed.js'
import { enqueueRankStep } from '#lib/train/rank_step.js'
import { type RankEvent, RankTrainer, type RankTrainerSetting } from '#lib/train/rank_trainer.js'
import { scratch } from '../data/ranking_requests.js'
import { bits, done, events, losses, records, setting, stateOf } from './rank_stream.js'

const files = scratch()
let reader: RequestReader
beforeAll(async () => {
  reader = await records(files.at)
})
afterEach(() => void vi.restoreAllMocks())

const make = (change: Partial<RankTrainerSetting> = {}) => new RankTrainer(reader, { ...setting, ...change })
const { options } = setting
const all: Partial<RankTrainerSetting> = {
  model: { ...setting.model, embeddings: 'hash' },
  options: { ...options, supervise: 'new', userRate: 0.5, stochasticLength: 1.4, tableRows: 160, whenFull: 'evict' },
}

/** A trainer on the CPU that lags as on CUDA: values arrive some turns late, later ones sooner. */
function lagging(trainer: RankTrainer): RankTrainer {
  Object.assign(trainer, { lag: 2 })
  let call = 0
  vi.spyOn(Tensor.prototype, 'data').mockImplementation(async function (this: Tensor) {
    const data = this.dataSync()
    for (let turn = 6 - 2 * (call++ % 3); turn > 0; turn--) await new Promise(resolve => setImmediate(resolve))
    return data
  })
  return trainer
}

/** Events but for the times in them. */
const told = (list: RankEvent[]) =>
  list.map(event => {
    const { impressionsPerSecond, etaSeconds, seconds, ...rest } = event as unknown as Record<string, unknown>
    return rest
  })

describe('a lagging run', () => {
  it.each([
    ['one pass', {}],
    ['everything at once', all],
  ])('tells the same, at most two steps late, and ends with the same bits: %s', async (_, change) => {
    const plain = make(change)
    const expected = await events(plain)
    const late = lagging(make(change))
    const ahead: number[] = []
    const list: RankEvent[] = []
    for await (const event of late.run()) {
      list.push(event)
      if (event.type === 'step') ahead.push(late.state.step - event.step)
    }
    expect(Math.max(...ahead)).toBe(2)
    expect(told(list)).toEqual(told(expected))
    expect(bits(late)).toEqual(bits(plain))
    expect(stateOf(late)).toEqual(stateOf(plain))
    const first = 100
    expect(await late.evaluate({ first })).toEqual(await plain.evaluate({ first }))
    for (const trainer of [plain, late]) trainer.dispose()
  })

  it.each([1, 4, 8, 17])(
    'killed at the event of step %i and resumed, ends with the bits of a whole run',
    async stop => {
      const whole = make(all)
      const expected = await events(whole)
      const folder = files.at(`killed ${stop}`)
      const killed = lagging(make({ ...all, folder }))
      await events(killed, stop)
      const resumed = lagging(await RankTrainer.resume(folder, reader))
      const from = resumed.state.step
      expect(from % 3).toBe(0)
      expect(from).toBeLessThanOrEqual(stop + 2)
      const list = await events(resumed)
      expect(losses(list)).toEqual(losses(expected).slice(from))
      expect(done(list)).toEqual(done(expected))
      expect(bits(resumed)).toEqual(bits(whole))
      expect(stateOf(resumed)).toEqual(stateOf(whole))
      for (const trainer of [whole, killed, resumed]) trainer.dispose()
    },
  )

  it('is interrupted, and saves when asked, with the values of all steps that were made', async () => {
    const whole = make()
    const expected = await events(whole)
    const folder = files.at('interrupted')
    const trainer = lagging(make({ folder, options: { ...options, checkpointEvery: 0 } }))
    const controller = new AbortController()
    const list: RankEvent[] = []
    for await (const event of trainer.run({ signal: controller.signal })) {
      list.push(event)
      if (event.type !== 'step') continue
      if (event.step === 2) {
        expect(trainer.state.step).toBe(4)
        await trainer.save()
        const saved = (await loadCheckpoint(`${folder}/checkpoint`)).json as unknown as Pick<RankTrainer, 'state'>
        expect(saved.state.step).toBe(4)
      }
      if (event.step === 6) controller.abort()
    }
    expect(list.at(-1)).toEqual({ type: 'interrupted', step: trainer.state.step, folder })
    expect(losses(list)).toEqual(losses(expected).slice(0, trainer.state.step))
    const resumed = await RankTrainer.resume(folder, reader)
    const rest = await events(resumed)
    expect([...losses(list), ...losses(rest)]).toEqual(losses(expected))
    expect(done(rest)).toEqual(done(expected))
    expect(bits(resumed)).toEqual(bits(whole))
    for (const each of [whole, trainer, resumed]) each.dispose()
  })

  it('names the step whose loss is not finite, and saves nothing after it', async () => {
    const huge = { ...options, lr: 1e300, checkpointEvery: 4 }
    const message = /loss became NaN at step 2: lower lr or set clipNorm/
    const plain = make({ options: huge })
    await expect(events(plain)).rejects.toThrow(message)
    const folder = files.at('nan')
    const late = lagging(make({ options: huge, folder }))
    await expect(events(late)).rejects.toThrow(message)
    await expect(late.save()).rejects.toThrow(message)
    expect((await loadCheckpoint(`${folder}/checkpoint`)).step).toBe(0)
    for (const trainer of [plain, late]) trainer.dispose()
  })
})

/** Lets call number `at` of all that may allocate fail (adamw does not); returns how many calls there were so far. */
function failAt(at: number): () => number {
  let calls = 0
  const addon = native as unknown as Record<string, (...args: unknown[]) => unknown>
  for (const name of ['create', ...Object.keys(native.signatures).filter(name => name !== 'adamw')]) {
    const call = addon[name]!
    vi.spyOn(addon, name).mockImplementation((...args) => {
      if (++calls === at) throw new HstuError('ERR_HSTU_OUT_OF_MEMORY', `out of memory in ${name}`)
      return call(...args)
    })
  }
  return () => calls
}

describe('a ranking step that runs out of memory', () => {
  it('was not made: the steps before it are told, and the run goes on to the same bits', async () => {
    const whole = make()
    const expected = await events(whole)
    const trainer = lagging(make())
    const list: RankEvent[] = []
    let held = { tensors: 0, bytes: 0 }
    const run = async (failing: number | null) => {
      for await (const event of trainer.run()) {
        list.push(event)
        if (failing === null || trainer.state.step !== 5 || losses(list).length !== 3) continue
        held = memory()
        failAt(failing)
      }
    }
    await expect(run(60)).rejects.toMatchObject({
      code: 'ERR_HSTU_OUT_OF_MEMORY',
      message: expect.stringMatching(
        /^step 6 \(8 requests, \d+ rows of history\) was abandoned, no parameter has changed; lower batchSize or maxHistory: out of memory in/,
      ),
    })
    vi.restoreAllMocks()
    expect(memory()).toEqual(held)
    expect(losses(list)).toEqual(losses(expected).slice(0, 5))
    await run(null)
    expect(losses(list)).toEqual(losses(expected))
    expect(done(list)).toEqual(done(expected))
    expect(bits(trainer)).toEqual(bits(whole))
    for (const each of [whole, trainer]) each.dispose()
  })

  it.each(['dense', 'hash'] as const)('changes nothing, wherever it fails: %s embeddings', async embeddings => {
    const trainer = make({ model: { ...setting.model, embeddings } })
    await events(trainer, 3)
    const { model, optimizer, table, options } = trainer
    const parts = { model, optimizer, table, philox: new Philox(1n) }
    const feed = new RankFeed(options, trainer.tasks, 'interleave', reader.manifest.sizes)
    const read = (await reader.batches({ batchSize: 4, first: 24 }).next()).value!
    const rates = { lr: 1e-3, tableLr: 1e-2 }
    const step = () => enqueueRankStep(parts, feed.work(read, 0), true, 4, rates)
    const dense = () =>
      [model.parameters, optimizer.m, optimizer.v].flatMap(group => Object.values(group).map(x => x.dataSync()))
    const rows = () => {
      if (!table) return null
      const { weights, accumulator } = table.tensors
      const given = table.size + 1
      return scope(() => [weights, accumulator].map(tensor => tensor.rows(0, given).dataSync()))
    }
    const keys = scope(() => rankerBatch(read, taskTargets(read, trainer.tasks), model.config).inputs.ids.dataSync())
    if (table) scope(() => void table.lookup(Tensor.from(keys), { insert: true })) // the step has no new ids
    const [before, beforeRows, held] = [dense(), rows(), memory()]
    let [at, ended] = [0, false]
    while (!ended) {
      const calls = failAt((at += 3))
      try {
        step()
        ended = calls() < at
      } catch (error) {
        vi.restoreAllMocks()
        expect(error).toMatchObject({ code: 'ERR_HSTU_OUT_OF_MEMORY' })
        expect(memory()).toEqual(held)
        expect([parts.philox.offset, optimizer.steps]).toEqual([0n, trainer.state.step])
        expect(dense()).toEqual(before)
        expect(rows()).toEqual(beforeRows)
      }
      vi.restoreAllMocks()
    }
    expect(at).toBeGreaterThan(200)
    expect(optimizer.steps).toBe(trainer.state.step + 1)
    trainer.dispose()
  })
})

const { usable } = native.backend().cuda
describe.skipIf(!usable)('on CUDA', () => {
  const cuda = { tensors: { device: 'cuda' } } as const

  it.each([
    ['dense', cuda],
    ['everything at once', { ...all, ...cuda }],
  ])('lags by at most two steps, repeats its bits, and goes on after a kill at any step: %s', async (name, change) => {
    const whole = make(change)
    const expected = await events(whole)
    const [wantedBits, wantedState] = [bits(whole), stateOf(whole)]
    const again = make(change)
    const ahead: number[] = []
    for await (const event of again.run()) if (event.type === 'step') ahead.push(again.state.step - event.step)
    expect(Math.max(...ahead)).toBe(2)
    expect(bits(again)).toEqual(wantedBits)
    expect(stateOf(again)).toEqual(wantedState)
    for (const trainer of [whole, again]) trainer.dispose()
    for (let stop = 1; stop < ahead.length; stop++) {
      const folder = files.at(`cuda ${name} ${stop}`)
      const killed = make({ ...change, folder })
      await events(killed, stop)
      const resumed = await RankTrainer.resume(folder, reader)
      const from = resumed.state.step
      expect(from % 3).toBe(0)
      expect(from).toBeLessThanOrEqual(stop + 2)
      const list = await events(resumed)
      expect(losses(list), `killed at ${stop}`).toEqual(losses(expected).slice(from))
      expect(done(list)).toEqual(done(expected))
      expect(bits(resumed)).toEqual(wantedBits)
      expect(stateOf(resumed)).toEqual(wantedState)
      for (const trainer of [killed, resumed]) trainer.dispose()
    }
  })
})
