import { spawnSync } from 'node:child_process'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { describe, expect, it } from 'vitest'
import { Random } from '#lib/random.js'
import { Admission } from '#lib/serve/admission.js'
import { Ranker } from '#lib/serve/ranker.js'
import { error, rankerBundle, small } from './ranker_fixture.js'
import { randomRequest } from './requests.js'

const { bundle } = rankerBundle()
const dist = pathToFileURL(join(import.meta.dirname, '../../dist/index.js')).href

const PRELUDE = `import { Ranker } from ${JSON.stringify(dist)}
const load = () => Ranker.load(${JSON.stringify(bundle)}, ${JSON.stringify(small)})
`

/** Runs a program that has `Ranker` and `load()`, a ranker of the bundle; @returns its exit code (null: it hung) and what it printed */
function runs(program: string, options = ''): { code: number | null; out: string } {
  const env = { ...process.env, NODE_OPTIONS: options }
  const { status, stdout, stderr } = spawnSync(process.execPath, ['--input-type=module', '-e', PRELUDE + program], {
    encoding: 'utf8',
    timeout: 30_000,
    env,
  })
  return { code: status, out: status ? stdout + stderr : stdout }
}

describe('edges of the engine', () => {
  it('tells of a thread that ends by itself, and does not let the process end before', () => {
    const preload = `data:text/javascript,${encodeURIComponent(
      "import { isMainThread } from 'node:worker_threads'; if (!isMainThread) setTimeout(() => process.exit(7), 1500)",
    )}`
    const ask = "{ user: '1', history: { items: ['1'], times: [1], actions: [[]] }, candidates: ['1', '2'], time: 5 }"
    const { code, out } = runs(
      `const ranker = await load()
const ask = () => ranker.rank(${ask}).then(ask, error => { if (error.code === 'ERR_HSTU_DEVICE_LOST') console.log('told'); else ask() })
ask()`,
      `--import ${preload}`,
    )
    expect({ code, out: out.trim() }).toEqual({ code: 0, out: 'told' })
  }, 40_000)

  it('lets the process end after a swap that failed', () => {
    const body = "const ranker = await load()\nawait ranker.swap('/nowhere').catch(error => console.log(error.code))"
    expect(runs(body)).toEqual({ code: 0, out: 'ERR_HSTU_CHECKPOINT\n' })
  }, 40_000)

  it('forgets a user with the requests that were sent before', async () => {
    await using ranker = await Ranker.load(bundle, small)
    const random = new Random(31)
    const request = { ...randomRequest(random, 100, 3), user: '1' }
    const sent = [ranker.rank(request), ranker.rank({ ...randomRequest(random, 90, 3), user: '1' })]
    await ranker.forgetUser('1')
    await Promise.all(sent)
    expect((await ranker.stats()).pages!.held).toBe(0)
    expect((await ranker.rank(request)).cache.state).toBe('cold')
  })

  it('does not take idle time for computing time after what waited was aborted', async () => {
    await using ranker = await Ranker.load(bundle, { ...small, maxBatchTokens: 100 })
    const random = new Random(32)
    const request = () => randomRequest(random, 90, 100)
    const controller = new AbortController()
    const sent = Array.from({ length: 5 }, () => ranker.rank(request()))
    const aborted = ranker.rank({ ...request(), signal: controller.signal })
    controller.abort()
    await expect(aborted).rejects.toThrow(error('ERR_HSTU_ABORTED', /abort/))
    await Promise.all(sent)
    await new Promise(resolve => setTimeout(resolve, 3000))
    await ranker.rank(request())
    await Promise.all([ranker.rank(request()), ranker.rank({ ...request(), deadlineMs: 400 })])
  })

  it('refuses a signal that is none, and keeps nothing of it', async () => {
    await using ranker = await Ranker.load(bundle, { ...small, queue: { requests: 2 } })
    const request = randomRequest(new Random(32), 10, 3)
    for (let i = 0; i < 4; i++)
      await expect(ranker.rank({ ...request, signal: {} as AbortSignal })).rejects.toEqual(
        error('ERR_HSTU_INVALID_ARGUMENT', /signal must be an AbortSignal, got object/),
      )
    await ranker.rank(request)
  })

  it('admits again after a bad moment', () => {
    const admission = new Admission({ requests: 1000, tokens: 1e6, bytes: 1e9 })
    admission.msPerToken = 0.01
    for (let i = 0; i < 2000; i++) admission.learn(Infinity)
    admission.count({ tokens: 100, bytes: 100 }, 1)
    admission.check({ tokens: 100, bytes: 100 }, { deadlineMs: 100 })
  })
})
