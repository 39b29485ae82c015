// Random requests through M-FALCON against each candidate alone through the training path, bit for bit.
import assert from 'node:assert/strict'
import type { ModelOptions } from '#lib/models/sequence_model.js'
import { Random } from '#lib/random.js'
import { encodeRequest, historyTokens, TOKEN_COLUMNS } from '#lib/serve/encode.js'
import { Falcon, whyNotCacheable } from '#lib/serve/falcon.js'
import { trainingLogits } from '#lib/serve/golden.js'
import type { Slot } from '#lib/serve/pass.js'
import type { RankRequest, WireRequest } from '#lib/serve/request.js'
import { forms, grow, randomRequest, stirred, wireOf } from './requests.js'

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

/** A model, and an engine of it for every size of pages: kept from scenario to scenario. */
export class Stage {
  readonly parts: ReturnType<typeof stirred>
  readonly #engines = new Map<string, Falcon>()

  constructor(form: string, options: ModelOptions = {}) {
    this.parts = stirred(forms[form]!, options)
  }

  engine(pageSize: number, graphs: boolean): Falcon {
    const key = `${pageSize} ${graphs}`
    const { model, table } = this.parts
    if (!this.#engines.has(key))
      this.#engines.set(
        key,
        new Falcon(model, table, pageSize, Math.ceil(POOL_TOKENS / pageSize), { graphs, sightings: 1 }),
      )
    return this.#engines.get(key)!
  }

  [Symbol.dispose](): void {
    for (const engine of this.#engines.values()) engine.dispose()
    this.parts.model.dispose()
    this.parts.table?.dispose()
  }
}

/** Logits [K] of some of the candidates of each request, each behind a history of its own; one of them also computed all alone. */
function oracle({ parts }: Stage, requests: readonly RankRequest[], random: Random) {
  const asked = requests.flatMap((request, b) => {
    const some: { b: number; m: number; wire: WireRequest }[] = []
    for (let m = 0; m < request.candidates.length; m += 1 + (m >> 2))
      some.push({ b, m, wire: wireOf({ ...request, candidates: [request.candidates[m]!] as string[] }) })
    return some
  })
  const wires = asked.map(({ wire }) => wire)
  const logits = trainingLogits(parts, wires, parts.encoder, parts.schema)
  const K = logits.length / asked.length
  const one = random.int(asked.length)
  assert.deepEqual(
    logits.subarray(one * K, (one + 1) * K),
    trainingLogits(parts, [wires[one]!], parts.encoder, parts.schema),
  )
  return asked.map(({ b, m }, i) => ({ b, m, alone: logits.subarray(i * K, (i + 1) * K) }))
}

/**
 * One scenario: a batch of requests cold; then again from the pages (hit), after new events (append), with history edited in the middle
 * (partial hit) or gone (evicted), candidates permuted, in other company and other microbatches, launched op by op or as padded graphs.
 * @returns candidates compared
 */
export async function runScenario({ seed, form }: Scenario, stage: Stage): Promise<number> {
  const { parts } = stage
  const random = new Random(`scenario ${seed}`)
  const pick = <T>(list: readonly T[]) => list[random.int(list.length)]!
  const pageSize = pick(PAGE_SIZES)
  const falcon = stage.engine(pageSize, random.float() < 0.5)
  const pages = new Pages(random, Math.ceil(POOL_TOKENS / pageSize))
  let compared = 0
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
    const passRows = Math.max(pick([1, 64, 1000]), Math.min(microbatch, 1000))
    const { logits, complete } = await falcon.score(slots, { microbatch, passRows })
    assert(complete.every(Boolean))
    kept = slots.map(({ request, pages }) => ({ history: request.history, pages: pages! }))
    for (const { b, m, alone } of oracle(stage, requests, random)) {
      const found = logits[b]!.subarray(m * alone.length, (m + 1) * alone.length)
      const where = `${form}, scenario ${seed}, round ${round}, request ${b}, candidate ${m}`
      assert.deepEqual(found, alone, `${where}: page ${pageSize}, microbatch ${microbatch}: ${found}, alone ${alone}`)
      compared++
    }
    if (crowd > 5 && round > 0) break
    requests = requests.map(request => next(random, request))
    if (random.float() < 0.2 || whyNotCacheable(parts.model.config)) kept = [] // evicted
  }
  return compared
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
