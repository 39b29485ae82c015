import { once } from 'node:events'
import { Worker } from 'node:worker_threads'
import { memory, Tensor } from '#lib/tensor.js'
import { runFixture } from './process.js'

const worker = (workerData: object) => new Worker(new URL('fixtures/busy_worker.mjs', import.meta.url), { workerData })

/** Messages of a worker until it ends by itself. */
async function messages(running: Worker): Promise<{ memory?: { tensors: number; bytes: number }; sums?: number[] }[]> {
  const received: object[] = []
  running.on('message', message => received.push(message))
  const [code] = await once(running, 'exit')
  expect(code).toBe(0)
  return received
}

describe('processes that end with ops in flight', () => {
  it('survives 40 workers terminated in flight', async () => {
    const { code, signal, stdout, stderr } = await runFixture('in_flight.mjs', ['terminate'])
    expect({ code, signal, stderr }).toEqual({ code: 0, signal: null, stderr: '' })
    expect(JSON.parse(stdout)).toEqual({ y: [4, 6], memory: { tensors: 3, bytes: 24 } })
  })

  it('survives the end of the last worker where the main thread never loaded the addon', async () => {
    const { code, signal, stdout, stderr } = await runFixture('only_workers.mjs', [])
    expect({ code, signal, stdout: stdout.trim(), stderr }).toEqual({ code: 0, signal: null, stdout: 'ok', stderr: '' })
  })

  it.each([
    ['exit', 7],
    ['throw', 1],
  ])('%s of the main thread gives exit code %i, no signal', async (mode, expected) => {
    for (let round = 0; round < 5; round++) {
      const { code, signal, stderr } = await runFixture('in_flight.mjs', [mode])
      expect({ code, signal }, stderr).toEqual({ code: expected, signal: null })
    }
  })

  it.each([
    ['throwInWorker', 1],
    ['exitInWorker', 3],
  ])('%s ends the worker alone', async (mode, expected) => {
    const { code, signal, stdout } = await runFixture('in_flight.mjs', [mode])
    expect({ code, signal, stdout: JSON.parse(stdout) }).toEqual({ code: 0, signal: null, stdout: { code: expected } })
  })

  it('obeys SIGTERM', async () => {
    expect(await runFixture('in_flight.mjs', ['kill'])).toMatchObject({ code: null, signal: 'SIGTERM' })
  })
})

describe('environments', () => {
  it('computes right results in two workers at once, and the same each time', async () => {
    const alone = await messages(worker({ seed: 1, rounds: 20 }))
    const both = await Promise.all([1, 1].map(seed => messages(worker({ seed, rounds: 100 }))))
    expect(alone.at(-1)!.sums).toHaveLength(1)
    for (const received of both) expect(received.at(-1)!.sums).toEqual(alone.at(-1)!.sums)
  })

  it('counts memory by environment', async () => {
    const before = memory()
    const kept = Tensor.zeros([10])
    const received = await messages(worker({ size: 16, rounds: 3 }))
    expect(received.at(-1)!.memory).toEqual({ tensors: 1, bytes: 16 * 16 * 4 })
    expect(memory()).toEqual({ tensors: before.tensors + 1, bytes: before.bytes + 40 })
    kept.dispose()
    expect(memory()).toEqual(before)
  })
})

it('gives equal bits at 1, 2 and 3 threads', async () => {
  const ended = await Promise.all(
    ['1', '2', '3'].map(HSTU_NUM_THREADS => runFixture('digest.mjs', [], { HSTU_NUM_THREADS })),
  )
  const results = ended.map(({ stdout }) => JSON.parse(stdout) as { threads: number; digest: string })
  expect(results.map(result => result.threads)).toEqual([1, 2, 3])
  expect(new Set(results.map(result => result.digest)).size).toBe(1)
})

it('frees tensors that were dropped without dispose', async () => {
  const { code, stdout, stderr } = await runFixture('garbage.mjs')
  expect(code, stderr).toBe(0)
  expect((JSON.parse(stdout) as { peak: number }).peak).toBeLessThan(64)
})
