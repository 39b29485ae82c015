import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { buildFakeCuda, onEachCuda, onFakeCuda } from './fake_cuda.js'
import type { Ended } from './process.js'

const root = mkdtempSync(join(tmpdir(), 'hstu-step-graphs-'))
beforeAll(buildFakeCuda, 600_000)
afterAll(() => rmSync(root, { recursive: true, force: true }))

const printed = ({ code, signal, stdout, stderr }: Ended) => {
  expect({ code, signal, stderr }).toEqual({ code: 0, signal: null, stderr: '' })
  return JSON.parse(stdout)
}

describe('StepGraphs', () => {
  onEachCuda('takes the steps that the padded batches take op by op, bit for bit', async run => {
    const { results, same } = printed(await run('step_graphs.mjs', ['equal']))
    expect(results).toHaveLength(4) // with and without times, negatives uniform and full
    for (const distinct of results.flat()) expect(distinct).toBe(10) // losses, all equal
    expect(same).toBe(true)
  })

  onEachCuda('captures a shape once, and launches every step as a graph and an update', async run => {
    const log = join(root, 'log')
    const env: Record<string, string> = run === onFakeCuda ? { FAKE_CUDA_LOG: log } : {}
    const { steps, shapes } = printed(await run('step_graphs.mjs', ['counts'], env))
    expect({ steps, few: shapes < steps }).toEqual({ steps: 8, few: true })
    if (run !== onFakeCuda) return
    const calls = readFileSync(log, 'utf8').split('\n')
    expect(calls.filter(call => call === 'cudaGraphInstantiate')).toHaveLength(shapes)
    expect(calls.filter(call => call === 'cudaGraphLaunch')).toHaveLength(8)
    const lastStep = calls.slice(calls.lastIndexOf('cudaGraphLaunch'))
    expect(lastStep.filter(call => call === 'launch')).toHaveLength(1)
  })

  onEachCuda('follows more shapes than it keeps', async run => {
    expect(printed(await run('step_graphs.mjs', ['shapes']))).toEqual({ equal: true, same: true })
  })

  onEachCuda('leaves everything as it was where a shape does not fit into memory', async run => {
    const { messages, unchanged, equal } = printed(await run('step_graphs.mjs', ['memory']))
    expect(messages.length).toBeGreaterThan(3)
    for (const message of messages)
      expect(message).toMatch(/^ERR_HSTU_OUT_OF_MEMORY step 2 \(400 users, \d+ tokens\) was abandoned/)
    expect({ unchanged, equal }).toEqual({ unchanged: true, equal: true })
  })

  onEachCuda('names an id outside the items, and leaves nothing', async run => {
    expect(printed(await run('step_graphs.mjs', ['refused']))).toEqual({
      ...{ code: 'ERR_HSTU_INVALID_ARGUMENT', message: 'batch.ids[1] is 21, the model has items 1 to 20', same: true },
    })
  })
})

describe('a Trainer with graphs', () => {
  onEachCuda('repeats its bits, resumes exactly and trains as one without', async run => {
    const result = printed(await run('step_graphs.mjs', ['trainer', mkdtempSync(join(root, 'run-'))]))
    const { worst, ...rest } = result
    expect(worst).toBeLessThan(1e-4)
    expect(rest).toEqual({ steps: 28, repeats: true, resumes: true, stopped: true, freed: true })
  })
})
