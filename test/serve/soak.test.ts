// Everything at once for HSTU_SOAK_SECONDS (default 6): three tenants, growing and edited histories, cancels, deadlines, bad requests, a
// cache too small for all, bundles swapped while requests are under way, users forgotten. Every score is held against the training path.
import { join } from 'node:path'
import { afterAll, beforeAll, expect, it } from 'vitest'
import { HstuError } from '#lib/errors.js'
import { Random } from '#lib/random.js'
import { trainingLogits } from '#lib/serve/golden.js'
import { Ranker } from '#lib/serve/ranker.js'
import type { RankRequest } from '#lib/serve/request.js'
import { buildIfMissing, temporaryFolder } from '../cli/process.js'
import { grow, randomRequest, schema, stirred, wireOf, writeTestBundle } from './requests.js'

const seconds = Number(process.env.HSTU_SOAK_SECONDS ?? 6)
const MIB = 2 ** 20
const folder = temporaryFolder()
const forms = { 'soak-1': {}, 'soak-2': { activation: 'softmax' as const } }
const parts = Object.fromEntries(Object.entries(forms).map(([model, form]) => [model, stirred(form)]))
afterAll(() => {
  for (const { model } of Object.values(parts)) model.dispose()
})
beforeAll(async () => {
  buildIfMissing()
  for (const [model, form] of Object.entries(forms)) await writeTestBundle(join(folder, model), form, model)
})

/** Two of the candidates' scores, as each has them alone. */
function expectSome(random: Random, request: RankRequest, model: string, scores: Record<string, Float64Array>): void {
  for (let k = 0; k < 2; k++) {
    const m = random.int(request.candidates.length)
    const alone = { ...request, candidates: [(request.candidates as string[])[m]!] }
    const [like, watch] = trainingLogits(parts[model]!, [wireOf(alone, 120)], parts[model]!.encoder, schema)
    expect([scores.like![m], scores.watch![m]]).toEqual([1 / (1 + Math.exp(-like!)), watch])
  }
}

it(
  `gives the right scores and leaks nothing in ${seconds} s of everything at once`,
  async () => {
    const random = new Random('soak')
    const limits = { maxHistory: 120, maxCandidates: 200, cacheBytes: 3 << 19, microbatch: 16 }
    const ranker = await Ranker.load(join(folder, 'soak-1'), {
      device: 'cpu',
      threads: 1,
      maxBatchTokens: 600,
      ...limits,
    })
    const users = Array.from({ length: 60 }, (_, u) => ({
      ...randomRequest(random, random.int(110), 1),
      ...{ user: String(1 + (u % 20)), tenant: `tenant ${u % 3}` },
    }))
    const outcomes: Record<string, number> = {}
    const memory: number[] = []
    const count = (name: string) => {
      outcomes[name] = (outcomes[name] ?? 0) + 1
    }
    const ask = async () => {
      const user = users[random.int(users.length)]!
      const dice = random.float()
      if (dice < 0.5) user.history = grow(random, user.history, random.int(6))
      else if (dice < 0.55)
        user.history = grow(random, { items: [], times: [], actions: [], series: [] }, random.int(40))
      if (user.history.items.length > 400)
        user.history = { ...grow(random, { items: [], times: [], actions: [], series: [] }, 30), start: 370 }
      const candidates = Array.from({ length: 1 + random.int(60) }, () => String(1 + random.int(64)))
      const request = { ...user, candidates, time: 3_000_000 + random.int(9999) }
      const controller = new AbortController()
      const kind = random.float()
      if (kind < 0.1) setTimeout(() => controller.abort(), 20 * random.float())
      const deadline = kind > 0.9 ? { deadlineMs: 10 * random.float() } : {}
      const broken = kind > 0.5 && kind < 0.53 ? { candidates: [] } : {}
      try {
        const { scores, model, cache } = await ranker.rank({
          ...request,
          ...deadline,
          ...broken,
          signal: controller.signal,
        })
        expectSome(random, request, model, scores)
        count(`${model} ${cache.state}`)
      } catch (error) {
        if (!(error instanceof HstuError)) throw error
        count(error.code)
      }
    }
    const end = performance.now() + 1e3 * seconds
    const sampler = setInterval(() => memory.push(process.memoryUsage().rss), 50)
    let swaps = 0
    const others = async () => {
      while (performance.now() < end) {
        const dice = random.float()
        const due = swaps === 0 && performance.now() > end - 500 * seconds
        if (due || dice < 0.06) await ranker.swap(join(folder, `soak-${1 + (++swaps % 2)}`))
        else if (dice < 0.2) await expect(ranker.swap(join(folder, 'none'))).rejects.toThrow(/expected a checkpoint/)
        else await ranker.forgetUser(String(1 + random.int(20)), { tenant: `tenant ${random.int(3)}` })
        await new Promise(resolve => setTimeout(resolve, 100))
      }
    }
    const caller = async () => {
      while (performance.now() < end) await ask()
    }
    await Promise.all([others(), ...Array.from({ length: 12 }, caller)])
    clearInterval(sampler)
    const stats = await ranker.stats()
    expect(stats).toMatchObject({ state: 'ready', swaps, queued: { requests: 0, tokens: 0, bytes: 0 } })
    expect(stats.pages).toMatchObject({ held: 0, leases: 0 })
    expect(stats.accepted).toBe(stats.completed + stats.failed)
    const wanted = ['soak-1 cold', 'soak-1 hit', 'soak-2 cold', 'ERR_HSTU_ABORTED', 'ERR_HSTU_INVALID_ARGUMENT']
    expect(Object.keys(outcomes)).toEqual(expect.arrayContaining(wanted))
    const half = memory.slice(memory.length >> 1)
    const mean = (list: number[]) => list.reduce((a, b) => a + b, 0) / list.length
    const quarter = half.length >> 1
    const growth = (mean(half.slice(quarter)) - mean(half.slice(0, quarter))) / MIB
    if (seconds > 30)
      console.log(
        outcomes,
        `resident memory ${(half.at(-1)! / MIB).toFixed(0)} MiB, last half ${growth.toFixed(1)} MiB more`,
      )
    expect(growth).toBeLessThan(48)
    await ranker.close()
  },
  1e3 * seconds + 60_000,
)
