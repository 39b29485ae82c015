import { check, HstuError } from '../errors.js'
import type { EmbeddingTable } from '../layers/embedding_table.js'
import { computeDtype } from '../layers/precision.js'
import type { GenerativeRanker } from '../models/generative_ranker.js'
import { native } from '../native.js'
import { dtypeBytes } from '../tensor.js'
import { onTop } from './base_rates.js'
import { type LoadedBundle, makeRanker, makeRates, type RankerManifest } from './bundle.js'
import { chooseDevice } from './device.js'
import { type EncodedRequest, type Encoder, encodeRequest, historyTokens, TOKEN_COLUMNS } from './encode.js'
import { Falcon, type Scored, whyNotCacheable } from './falcon.js'
import type { BatchHooks, Host, Progress } from './host.js'
import type { HostOptions, ModelInfo } from './messages.js'
import { type PackedRequest, unpackRequest } from './packed.js'
import { PAGE_SIZE, type PageKey, type PageLease, PageManager, type PageStatistics } from './page_manager.js'
import type { Slot } from './pass.js'
import type { Waiting } from './queue.js'
import { checkRequest, ownerText, sameHistory, type WireRequest } from './request.js'
import { RequestEncoder } from './request_encoder.js'
import { joined } from './words.js'

/** b by default: on CUDA what fills the device. */
const MICROBATCH = { cpu: 1024, cuda: 4096 } as const
const MIB = 2 ** 20
/** Largest relative difference to the golden logits, which were computed on a CPU in float32. */
const GOLDEN_TOLERANCE = { float32: 1e-3, bf16: 5e-2 }

/** What one ranking gives its caller. */
export interface RankReply {
  /** [m, K] */
  logits: Float32Array
  model: string
  /** Tokens of the history, and those that were read from the cache. */
  history: number
  cached: number
  /** 'hit': all full pages were there. */
  state: 'cold' | 'partial' | 'hit'
  unknown: number
  /** Requests computed in the same batch. */
  batch: number
}

/** Requests of one user with the same history: one sequence, all their candidates behind it. */
interface Group {
  waiting: { waiting: Waiting; request: EncodedRequest }[]
  request: EncodedRequest
  lease: PageLease | null
}

/** A ranker, its cache of histories, and the requests that are computed with both. */
export class RankHost implements Host {
  readonly info: ModelInfo
  readonly rules = {
    ownerOf: (wire: unknown) => ownerText(wire as WireRequest),
    together: (a: unknown, b: unknown) => sameHistory(a as WireRequest, b as WireRequest),
  }
  readonly #model: GenerativeRanker
  readonly #table: EmbeddingTable | null
  readonly #falcon: Falcon
  readonly #cache: PageManager
  readonly #encoder: Encoder
  readonly #microbatch: number
  readonly #requests: RequestEncoder

  private constructor(bundle: LoadedBundle<RankerManifest>, options: HostOptions, progress: Progress) {
    const { manifest, vocabularies } = bundle
    const device = chooseDevice(options.device)
    progress('model', 1, 4)
    const { model, table } = makeRanker(bundle, { device })
    this.#model = model
    this.#table = table
    try {
      const { schema, architecture: config } = manifest
      const maxHistory = options.maxHistory ?? manifest.maxHistory
      const perRow = config.fusion === 'add' ? 1 : 2
      const base = 1 + schema.contextual.length
      const most = base + perRow * maxHistory
      check(!config.positions || most < config.positions, 'ERR_HSTU_INVALID_ARGUMENT', () => {
        return `maxHistory ${maxHistory} makes ${most} tokens, the model's position table has ${config.positions} rows`
      })
      const dtype = computeDtype(model.options.precision ?? 'float32', model.options)
      const pageBytes = Falcon.pageBytes(config, PAGE_SIZE, dtypeBytes[dtype])
      const cacheBytes = options.cacheBytes ?? (device === 'cpu' ? 256 : 2048) * MIB
      const pages = Math.floor(cacheBytes / pageBytes)
      const golden = base + perRow * manifest.golden.request.history.items.length
      const needed = Math.ceil(Math.max(most, golden) / PAGE_SIZE)
      check(pages >= needed, 'ERR_HSTU_INVALID_ARGUMENT', () => {
        return `cacheBytes ${cacheBytes} holds no history of maxHistory ${maxHistory}: it takes ${needed * pageBytes} bytes`
      })
      progress('cache', 2, 4)
      this.#cache = new PageManager({
        ...{ pages, pageSize: PAGE_SIZE, pageBytes, tokenBytes: TOKEN_COLUMNS * BigInt64Array.BYTES_PER_ELEMENT },
        ...(options.cacheTtlMs === null ? {} : { ttlMs: options.cacheTtlMs }),
      })
      this.#encoder = { config, vocabularies, unknownIds: options.unknownIds, rates: makeRates(bundle) }
      this.#requests = new RequestEncoder(this.#encoder, options.cacheTtlMs)
      this.#falcon = new Falcon(model, table, PAGE_SIZE, pages, { deterministic: options.deterministic })
      this.#microbatch = options.microbatch ?? MICROBATCH[device === 'cpu' ? 'cpu' : 'cuda']
      this.info = {
        ...{ model: manifest.model, device, schema, maxHistory, base, perRow, cacheOff: whyNotCacheable(config) },
        tasks: config.tasks.map(task => ({ name: task.name, kind: task.kind })),
      }
    } catch (error) {
      model.dispose()
      table?.dispose()
      throw error
    }
  }

  /** @throws HstuError ERR_HSTU_CHECKPOINT also where the golden request gets other scores than it should */
  static async load(bundle: LoadedBundle<RankerManifest>, options: HostOptions, progress: Progress): Promise<RankHost> {
    const host = new RankHost(bundle, options, progress)
    try {
      progress('golden', 3, 4)
      await host.#verify(bundle)
      await host.#falcon.warmUp(host.info.base + host.info.perRow * host.info.maxHistory)
      progress('ready', 4, 4)
      return host
    } catch (error) {
      host.dispose()
      throw error
    }
  }

  async #verify({ folder, manifest: { golden, schema, precision } }: LoadedBundle<RankerManifest>): Promise<void> {
    const limits = { ...schema, maxHistory: Number.MAX_SAFE_INTEGER, maxCandidates: Infinity }
    const request = encodeRequest(checkRequest(golden.request, limits), { ...this.#encoder, unknownIds: 'error' })
    const pages = Int32Array.from({ length: Math.ceil(historyTokens(request) / PAGE_SIZE) }, (_, k) => k)
    const { logits } = await this.#falcon.score([{ request, pages, cached: 0, stored: 0 }], { microbatch: 3 })
    const tolerance = GOLDEN_TOLERANCE[this.info.device === 'cpu' ? 'float32' : precision]
    const same = (found: number, wanted: number) => Math.abs(found - wanted) <= tolerance * (1 + Math.abs(wanted))
    const found = onTop(logits[0]!, request.base)
    const wrong = golden.logits.findIndex((wanted, i) => !same(found[i]!, wanted))
    check(wrong < 0, 'ERR_HSTU_CHECKPOINT', () => {
      return `${folder}/manifest.json: json.golden.logits[${wrong}]: the model gives ${found[wrong]}, expected ${golden.logits[wrong]}`
    })
  }

  async run(batch: readonly Waiting[], hooks: BatchHooks): Promise<Waiting[]> {
    const { groups, left } = this.#admit(this.#group(batch, hooks))
    if (groups.length === 0) return left
    try {
      await this.#compute(groups, batch.length - left.length, hooks)
    } catch (error) {
      if (!(error instanceof HstuError) || error.code !== 'ERR_HSTU_OUT_OF_MEMORY') throw error
      // Give back what is kept unused, and try once more, one by one.
      this.#falcon.trim()
      native.trim(this.info.device)
      for (const group of groups)
        try {
          await this.#compute([group], group.waiting.length, hooks)
        } catch (again) {
          if (!(again instanceof HstuError) || again.code !== 'ERR_HSTU_OUT_OF_MEMORY') throw again
          for (const { waiting } of group.waiting) hooks.refuse(waiting, again)
        }
    } finally {
      for (const { lease } of groups) lease?.release()
    }
    return left
  }

  unpack(wire: unknown): WireRequest {
    return unpackRequest(wire as PackedRequest)
  }

  prepare(waiting: Waiting): void {
    this.#requests.prepare(waiting)
  }

  /** Encodes the requests and puts those of the same history together. */
  #group(batch: readonly Waiting[], hooks: BatchHooks): Group[] {
    const groups = new Map<string, Group>()
    for (const waiting of batch) {
      const wire = waiting.wire as WireRequest
      try {
        const request = this.#requests.encoded(waiting)
        const group = groups.get(ownerText(wire))
        if (group) group.waiting.push({ waiting, request })
        else groups.set(ownerText(wire), { waiting: [{ waiting, request }], request, lease: null })
      } catch (error) {
        hooks.refuse(waiting, error as HstuError)
      }
    }
    for (const group of groups.values()) {
      const { waiting } = group
      if (waiting.length === 1) continue
      const all = (of: (request: EncodedRequest) => BigInt64Array) => joined(waiting.map(({ request }) => of(request)))
      group.request = {
        ...group.request,
        ...{ candidates: all(r => r.candidates), candidateTimes: all(r => r.candidateTimes) },
      }
    }
    return [...groups.values()]
  }

  /** The cached rows of a history depend on its tokens, and on where it was cut. */
  #keyOf({ tenant, user, start }: WireRequest): PageKey {
    return { model: this.info.model, tenant, user, seed: Float64Array.of(start) }
  }

  /** Leases pages; groups for which there are none now are left for the next batch. */
  #admit(all: readonly Group[]): { groups: Group[]; left: Waiting[] } {
    const groups: Group[] = []
    const left: Waiting[] = []
    for (const group of all) {
      const { request, waiting } = group
      const kept = this.info.cacheOff === null || request.candidates.length > this.#microbatch
      try {
        if (kept)
          group.lease = this.#cache.acquire(
            this.#keyOf(waiting[0]!.waiting.wire as WireRequest),
            request.history,
            request.hashes,
          )
        groups.push(group)
      } catch (error) {
        if (!(error instanceof HstuError) || error.code !== 'ERR_HSTU_OVERLOADED' || groups.length === 0) throw error
        left.push(...waiting.map(one => one.waiting))
      }
    }
    return { groups, left }
  }

  async #compute(groups: readonly Group[], batch: number, hooks: BatchHooks): Promise<void> {
    const slots = groups.map(({ request, lease }): Slot => {
      const stored = lease?.cached ?? 0
      const cached = Math.min(stored, historyTokens(request) - 1)
      return { request, pages: lease?.pages ?? null, stored, cached }
    })
    const groupOf = new Map(slots.map((slot, g) => [slot, groups[g]!]))
    const scored = await this.#falcon.score(slots, {
      microbatch: this.#microbatch,
      wait: batch === 1, // else more is likely to come meanwhile, to be encoded
      wanted: slot => groupOf.get(slot)!.waiting.some(({ waiting }) => hooks.wanted(waiting)),
    })
    for (const [g, group] of groups.entries()) this.#tell(group, slots[g]!, scored, g, batch, hooks)
    hooks.tell()
    if (this.info.cacheOff === null) for (const { lease } of groups) lease?.commit()
    const sum = (of: (slot: Slot) => number) => slots.reduce((total, slot) => total + of(slot), 0)
    hooks.count({
      ...{ groups: groups.length, cached: sum(slot => slot.cached) },
      history: sum(slot => historyTokens(slot.request)),
      candidates: sum(slot => slot.request.candidates.length),
    })
  }

  #tell(
    { waiting }: Group,
    slot: Slot,
    { logits, complete, prefill, candidates }: Scored,
    g: number,
    batch: number,
    hooks: BatchHooks,
  ): void {
    const K = this.info.tasks.length
    const history = historyTokens(slot.request)
    const { cached } = slot
    const most = Math.min(history - (history % PAGE_SIZE), history - 1)
    const state = cached === 0 ? 'cold' : cached === most ? 'hit' : 'partial'
    let first = 0
    for (const { waiting: one, request } of waiting) {
      const end = first + request.candidates.length * K
      const own = onTop(waiting.length === 1 ? logits[g]! : logits[g]!.slice(first, end), request.base)
      const { model } = this.info
      const reply: RankReply = { logits: own, model, history, cached, state, unknown: request.unknown, batch }
      first = end
      if (complete[g]) hooks.done(one, reply, { prefill, candidates })
      else hooks.refuse(one, new HstuError('ERR_HSTU_ABORTED', 'the deadline passed, or the request was aborted'))
    }
  }

  forget({ tenant, user }: { tenant: string; user: string }): unknown {
    this.#requests.forget({ tenant, user })
    return this.#cache.forgetUser(tenant, user)
  }

  pages(): PageStatistics {
    return this.#cache.stats()
  }

  dispose(): void {
    this.#falcon?.dispose()
    this.#model.dispose()
    this.#table?.dispose()
  }
}
