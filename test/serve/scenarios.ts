// Random requests through M-FALCON against each candidate alone through the training path, bit for bit.
import assert from 'node:assert/strict'
import type { ModelOptions } from '#lib/models/sequence_model.js'
import { Random } from '#lib/random.js'
import { encodeRequest, historyTokens, TOKEN_COLUMNS } from '#lib/serve/encode.js'
import { Falcon, whyNotCacheable } from '#lib/serve/falcon.js'
import { trainingLogits } from '#lib/serve/golden.js'
import type { Slot } from '#lib/serve/pass.js'
import type { RankRequest } from '#lib/serve/request.js'
import { forms, grow, randomRequest, schema, stirred, wireOf } from './requests.js'

const PAGE_SIZES = [1, 4, 16, 64]
const MICROBATCHES = [1, 7, 64, 256, Infinity]
const POOL_TOKENS = 1 << 13

/** Pages of a pool, given in a random order: chains of pages are never contiguous. */
class Pages {
  #free: number[]
  constructor(random: Random, count: number) {
    this.#free = Array.from({ length: count }, (_, k) => k)
    for (let i = count - 1; i > 0; i--) {
      const j = random.int(i + 1)
      ;[this.#free[i], this.#free[j]] = [this.#free[j]!, this.#free[i]!]
    }
  }
  take(count: number): Int32Array {
    assert(count <= this.#free.length, 'the scenario has too few pages')
    return Int32Array.from(this.#free.splice(0, count))
  }
}

/** How many leading tokens two histories share. */
function shared(a: BigInt64Array, b: BigInt64Array): number {
  let n = 0
  while (n < Math.min(a.length, b.length) && a[n] === b[n]) n++
  return Math.floor(n / TOKEN_COLUMNS)
}

export interface Scenario {
  seed: number
  form: string
}

/** `count` scenarios, the forms in turn. */
export function scenarios(count: number): Scenario[] {
  const names = Object.keys(forms)
  return Array.from({ length: count }, (_, seed) => ({ seed, form: names[seed % names.length]! }))
}

const models = new Map<string, ReturnType<typeof stirred>>()

/** Models of the scenarios are kept between them; frees them. */
export function disposeModels(): void {
  for (const { model } of models.values()) model.dispose()
  models.clear()
}

/**
 * One scenario: a batch of requests cold; then again from the pages (hit), after new events (append), with history edited in the middle
 * (partial hit) or gone (evicted), candidates permuted, in other company and other microbatches. @returns candidates compared
 */
export async function runScenario({ seed, form }: Scenario, options: ModelOptions = {}): Promise<number> {
  const key = `${form} ${options.device} ${options.precision}`
  if (!models.has(key)) models.set(key, stirred(forms[form]!, options))
  const parts = models.get(key)!
  const random = new Random(`scenario ${seed}`)
  const pick = <T>(list: readonly T[]) => list[random.int(list.length)]!
  const pageSize = pick(PAGE_SIZES)
  const falcon = new Falcon(parts.model, parts.table, pageSize, Math.ceil(POOL_TOKENS / pageSize))
  const pages = new Pages(random, Math.ceil(POOL_TOKENS / pageSize))
  let compared = 0
  try {
    const crowd = pick([1, 1, 2, 5, 32])
    const most = crowd === 32 ? 12 : 150
    let requests = Array.from({ length: crowd }, () =>
      randomRequest(random, random.int(most), 1 + random.int(crowd > 5 ? 4 : 24)),
    )
    if (seed % 50 === 0) requests[0] = randomRequest(random, 90, 300)
    let kept: { history: BigInt64Array; pages: Int32Array }[] = []
    for (let round = 0; round < 3; round++) {
      const encoded = requests.map(request => encodeRequest(wireOf(request), parts.encoder))
      const microbatch = pick(MICROBATCHES)
      const slots = encoded.map((request, b): Slot => {
        const h = historyTokens(request)
        const before = kept[b]
        const same = before ? shared(before.history, request.history) : 0
        // Its own last page goes on after the shared tokens; an edited history gets new pages from the first one that differs.
        const appended = before !== undefined && same === before.history.length / TOKEN_COLUMNS
        const stored = appended ? same : Math.floor(same / pageSize) * pageSize
        const old = before ? [...before.pages].slice(0, Math.ceil(stored / pageSize)) : []
        const own = pages.take(Math.ceil(h / pageSize) - old.length)
        return { request, pages: Int32Array.from([...old, ...own]), stored, cached: Math.min(stored, h - 1) }
      })
      const passRows = pick([1, 64, 1000])
      const { logits, complete } = await falcon.score(slots, {
        microbatch,
        passRows: Math.max(passRows, Math.min(microbatch, 1000)),
      })
      assert(complete.every(Boolean))
      kept = slots.map(({ request, pages }) => ({ history: request.history, pages: pages! }))
      for (const [b, request] of requests.entries()) {
        const K = 2
        for (let m = 0; m < request.candidates.length; m += 1 + (m >> 2)) {
          const alone = trainingLogits(
            parts,
            wireOf({ ...request, candidates: [request.candidates[m]!] as string[] }),
            parts.encoder,
            schema,
          )
          const found = logits[b]!.subarray(m * K, (m + 1) * K)
          assert.deepEqual(
            found,
            alone,
            `${form}, round ${round}, request ${b}, candidate ${m}: page ${pageSize}, microbatch ${microbatch}`,
          )
          compared++
        }
      }
      if (crowd > 5 && round > 0) break
      requests = requests.map(request => next(random, request))
      if (random.float() < 0.2 || whyNotCacheable(parts.model.config)) kept = [] // evicted
    }
    return compared
  } finally {
    falcon.dispose()
  }
}

/** The user's next request. */
function next(random: Random, request: RankRequest): RankRequest {
  const candidates = [...(request.candidates as string[])].sort(() => random.float() - 0.5)
  const { history } = request
  const edit = random.float()
  if (edit < 0.3) return { ...request, candidates } // the same history: all of it is there
  const grown = grow(random, history, 1 + random.int(20))
  if (edit < 0.7) return { ...request, candidates, history: grown, time: (grown.times as number[]).at(-1)! + 5 }
  const at = random.int(grown.items.length)
  const items = [...(grown.items as string[])]
  items[at] = (grown.series as number[])[at] ? 'l2' : '7'
  return { ...request, candidates, history: { ...grown, items } }
}
