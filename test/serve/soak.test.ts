// Everything at once for HSTU_SOAK_SECONDS (default 6): three tenants, growing and edited histories, cancels, deadlines, bad requests, a
// cache too small for all, bundles swapped while requests are under way, users forgotten. Every score is held against the training path on
// the same device. A row of `hstu selftest` too.
import { deepEqual, equal, ok, rejects } from 'node:assert/strict'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { HstuError } from '#lib/errors.js'
import { Random } from '#lib/random.js'
import { trainingLogits } from '#lib/serve/golden.js'
import { Ranker } from '#lib/serve/ranker.js'
import type { RankRequest } from '#lib/serve/request.js'
import { memory } from '#lib/tensor.js'
import { itOp } from '../harness.js'
import { grow, randomRequest, schema, stirred, wireOf, writeTestBundle } from './requests.js'

const seconds = Number(process.env.HSTU_SOAK_SECONDS ?? 6)
const MIB = 2 ** 20
const forms = { 'soak-1': {}, 'soak-2': { activation: 'softmax' as const } }
const mean = (list: readonly number[]) => list.reduce((a, b) => a + b, 0) / list.length

class Soak {
  readonly random = new Random('soak')
  readonly outcomes: Record<string, number> = {}
  readonly #parts: Record<string, ReturnType<typeof stirred>>
  /** When it ends. */
  readonly end = performance.now() + 1e3 * seconds
  readonly #users = Array.from({ length: 60 }, (_, u) => ({
    ...randomRequest(this.random, this.random.int(110), 1),
    ...{ user: String(1 + (u % 20)), tenant: `tenant ${u % 3}` },
  }))

  constructor(
    readonly ranker: Ranker,
    device: 'cpu' | 'cuda',
  ) {
    this.#parts = Object.fromEntries(Object.entries(forms).map(([model, form]) => [model, stirred(form, { device })]))
  }

  #count(name: string): void {
    this.outcomes[name] = (this.outcomes[name] ?? 0) + 1
  }

  /** Two of the candidates' scores, as each has them alone. */
  #check(request: RankRequest, model: string, scores: Record<string, Float64Array>): void {
    const parts = this.#parts[model]!
    for (let k = 0; k < 2; k++) {
      const m = this.random.int(request.candidates.length)
      const alone = { ...request, candidates: [(request.candidates as string[])[m]!] }
      const [like, watch] = trainingLogits(parts, [wireOf(alone, 120)], parts.encoder, schema)
      deepEqual([scores.like![m], scores.watch![m]], [1 / (1 + Math.exp(-like!)), watch])
    }
  }

  async ask(): Promise<void> {
    const { random } = this
    const none = { items: [], times: [], actions: [], series: [] }
    const user = this.#users[random.int(this.#users.length)]!
    const dice = random.float()
    if (dice < 0.5) user.history = grow(random, user.history, random.int(6))
    else if (dice < 0.55) user.history = grow(random, none, random.int(40))
    if (user.history.items.length > 400) user.history = { ...grow(random, none, 30), start: 370 }
    const candidates = Array.from({ length: 1 + random.int(60) }, () => String(1 + random.int(64)))
    const request = { ...user, candidates, time: 3_000_000 + random.int(9999) }
    const controller = new AbortController()
    const kind = random.float()
    if (kind < 0.1) setTimeout(() => controller.abort(), 20 * random.float())
    const deadline = kind > 0.9 ? { deadlineMs: 10 * random.float() } : {}
    const broken = kind > 0.5 && kind < 0.53 ? { candidates: [] } : {}
    const { signal } = controller
    try {
      const { scores, model, cache } = await this.ranker.rank({ ...request, ...deadline, ...broken, signal })
      this.#check(request, model, scores)
      this.#count(`${model} ${cache.state}`)
    } catch (error) {
      if (!(error instanceof HstuError)) throw error
      this.#count(error.code)
    }
  }

  /** Swaps bundles and forgets users; @returns how often it swapped */
  async disturb(folder: string): Promise<number> {
    let swaps = 0
    while (performance.now() < this.end) {
      const dice = this.random.float()
      const due = swaps === 0 && performance.now() > this.end - 500 * seconds
      if (due || dice < 0.06) await this.ranker.swap(join(folder, `soak-${1 + (++swaps % 2)}`))
      else if (dice < 0.2) await rejects(this.ranker.swap(join(folder, 'none')), /expected a checkpoint/)
      else await this.ranker.forgetUser(String(1 + this.random.int(20)), { tenant: `tenant ${this.random.int(3)}` })
      await new Promise(resolve => setTimeout(resolve, 100))
    }
    return swaps
  }

  dispose(): void {
    for (const { model } of Object.values(this.#parts)) model.dispose()
  }
}

async function soak(device: 'cpu' | 'cuda'): Promise<void> {
  const before = memory(device).used
  const folder = mkdtempSync(join(tmpdir(), 'hstu-soak-'))
  try {
    for (const [model, form] of Object.entries(forms)) await writeTestBundle(join(folder, model), form, model)
    const limits = { maxHistory: 120, maxCandidates: 200, cacheBytes: 3 << 19, microbatch: 16 }
    const ranker = await Ranker.load(join(folder, 'soak-1'), {
      ...{ device, maxBatchTokens: 600, ...limits },
      ...(device === 'cpu' ? { threads: 1 } : {}),
    })
    const all = new Soak(ranker, device)
    const resident: number[] = []
    const sampler = setInterval(() => resident.push(process.memoryUsage.rss()), 50)
    const caller = async () => {
      while (performance.now() < all.end) await all.ask()
    }
    const [swaps] = await Promise.all([all.disturb(folder), ...Array.from({ length: 12 }, caller)])
    clearInterval(sampler)
    const stats = await ranker.stats()
    deepEqual([stats.state, stats.swaps, stats.queued], ['ready', swaps, { requests: 0, tokens: 0, bytes: 0 }])
    deepEqual([stats.pages!.held, stats.pages!.leases], [0, 0])
    equal(stats.accepted, stats.completed + stats.failed)
    const wanted = ['soak-1 cold', 'soak-1 hit', 'soak-2 cold', 'ERR_HSTU_ABORTED', 'ERR_HSTU_INVALID_ARGUMENT']
    for (const outcome of wanted) ok(all.outcomes[outcome], `${outcome} in ${JSON.stringify(all.outcomes)}`)
    await ranker.close()
    all.dispose()
    equal(memory(device).used, before, 'bytes of the device that are in use, before and after')
    const [half, quarter] = [resident.length >> 1, (3 * resident.length) >> 2]
    const growth = (mean(resident.slice(quarter)) - mean(resident.slice(half, quarter))) / MIB
    const kept = `resident memory ${(resident.at(-1)! / MIB).toFixed(0)} MiB, in the last half ${growth.toFixed(1)} MiB more`
    if (seconds > 30) console.error(all.outcomes, kept)
    ok(growth < 48, kept)
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
}

const name = `gives the right scores and leaks nothing in ${seconds} s of everything at once`
const timeoutMs = 1e3 * seconds + 60_000
itOp('soak', name, () => soak('cpu'), 'cpu', timeoutMs)
itOp('soak', name, () => soak('cuda'), 'cuda', timeoutMs)
