import { check, HstuError } from '../errors.js'
import { sameColumns, sameIds, textIds, type WireIds } from './ids.js'
import { columnsIn, ROW_BYTES } from './packed.js'
import type { Id } from './vocabulary.js'
import { Words } from './words.js'

/** Ids side by side; plain arrays may mix the kinds. */
export type Ids = readonly Id[] | BigInt64Array | BigUint64Array | Int32Array | Uint32Array | Float64Array
type Numbers = ArrayLike<number | bigint>

/** What a user did, in order of time. */
export interface RankHistory {
  /** Ids of items; in rows of an auxiliary series its values. */
  items: Ids
  /** Whole seconds. */
  times: Numbers
  /** Of each row: a mask of bits in the order of the model's actions, or their names. Default none. */
  actions?: ArrayLike<number> | readonly (readonly string[])[]
  /** 0: an item, s: a value of auxiliary series s. Default 0. */
  series?: ArrayLike<number>
  /** Rows of the user that come before the first one given; default 0. */
  start?: number
}

/** Candidates to score for a user, and all that the scores depend on. */
export interface RankRequest {
  /** Histories are cached by tenant and user; nothing is shared between tenants. Default ''. */
  tenant?: string
  user: Id
  history: RankHistory
  /** Scored as if each were alone. */
  candidates: Ids
  /** The model's contextual features by name; those left out are unknown. */
  context?: Readonly<Record<string, Id | null>>
  /** Whole seconds; default now. */
  time?: number | bigint
}

/** What of a model and its engine requests are checked against. */
export interface RequestLimits {
  actions: readonly string[]
  contextual: readonly string[]
  series: readonly string[]
  /** Rows of a history: the latest ones are kept. */
  maxHistory: number
  maxCandidates: number
}

/** A checked request, of arrays of its own: nothing that the caller does to theirs matters any more. */
export interface WireRequest {
  tenant: string
  user: string | bigint
  /** Number of the first row kept among all of the user's. */
  start: number
  items: WireIds
  times: BigInt64Array
  actions: Int32Array
  series: Uint8Array
  candidates: WireIds
  context: (string | bigint | null)[]
  time: bigint
}

const fail = (message: string): never => {
  throw new HstuError('ERR_HSTU_INVALID_ARGUMENT', `request: ${message}`)
}
const shown = (value: unknown) => (typeof value === 'bigint' ? `${value}n` : (JSON.stringify(value) ?? String(value)))

function idOf(id: unknown, name: string): string | bigint {
  if (typeof id === 'string' || typeof id === 'bigint') return id
  if (typeof id === 'number' && Number.isSafeInteger(id)) return BigInt(id)
  return fail(`${name} must be text, a bigint or a whole number below 2^53, got ${shown(id)}`)
}

/** Checks that an array can be read: typed arrays whose memory was transferred away read as empty. */
function readable(array: unknown, name: string): asserts array is ArrayLike<unknown> {
  if (ArrayBuffer.isView(array)) {
    if (array.buffer.byteLength === 0)
      try {
        new Uint8Array(array.buffer)
      } catch {
        fail(`${name} is detached: its memory was transferred`)
      }
    check(!(array instanceof DataView), 'ERR_HSTU_INVALID_ARGUMENT', () => `request: ${name} must be an array`)
  } else if (!Array.isArray(array)) fail(`${name} must be an array, got ${shown(array)}`)
}

function idsOf(ids: Ids, name: string, first = 0): WireIds {
  if (ids instanceof BigInt64Array) return ids.slice(first)
  const count = ids.length - first
  let whole = true
  for (let i = first; i < ids.length && whole; i++) whole = typeof ids[i] !== 'string'
  if (!whole)
    return (
      textIds(ids as readonly Id[], first) ??
      textIds(Array.from({ length: count }, (_, i) => String(idOf(ids[i + first], `${name}[${i + first}]`))))!
    )
  const all = new Words(count)
  for (let i = 0; i < count; i++) {
    const id = ids[i + first]
    if (Number.isSafeInteger(id)) all.putNumber(i, id as number)
    else {
      const big = idOf(id, `${name}[${i + first}]`) as bigint
      all.values[i] = big
      if (all.values[i] !== big) fail(`${name}[${i + first}] ${shown(id)} is beyond 64 bits: give it as text`)
    }
  }
  return all.values
}

function second(value: unknown, name: string): bigint {
  if (typeof value === 'bigint') return BigInt.asIntN(64, value) === value ? value : fail(`${name} is beyond 64 bits`)
  if (typeof value === 'number' && Number.isSafeInteger(value)) return BigInt(value)
  return fail(`${name} must be a whole number of seconds, got ${shown(value)}`)
}

function secondsOf(values: Numbers, name: string, first: number, into?: BigInt64Array): BigInt64Array {
  const all = new Words(into ?? values.length - first)
  if (values instanceof BigInt64Array) all.values.set(values.subarray(first))
  else
    for (let i = first; i < values.length; i++) {
      const value = values[i]
      if (Number.isSafeInteger(value)) all.putNumber(i - first, value as number)
      else all.values[i - first] = second(value, `${name}[${i}]`)
    }
  return all.values
}

function putActions(
  masks: Int32Array,
  actions: NonNullable<RankHistory['actions']>,
  known: readonly string[],
  first: number,
): void {
  const sets = 2 ** known.length
  for (let i = first; i < actions.length; i++) {
    const given: unknown = actions[i]
    let mask = 0
    if (typeof given === 'number') mask = given
    else if (Array.isArray(given))
      for (const action of given) {
        const bit = known.indexOf(action)
        if (bit < 0) fail(`history.actions[${i}]: there is no action ${shown(action)}; actions are ${known.join(', ')}`)
        mask |= 1 << bit
      }
    else mask = -1
    if (!(Number.isInteger(mask) && mask >= 0 && mask < sets))
      fail(`history.actions[${i}] must be a mask of ${known.length} bits or a list of names, got ${shown(given)}`)
    masks[i - first] = mask
  }
}

function putSeries(rows: Uint8Array, given: ArrayLike<number>, series: readonly string[], first: number): void {
  for (let i = first; i < given.length; i++) {
    const s = given[i]!
    if (!(Number.isInteger(s) && s >= 0 && s <= series.length))
      fail(`history.series[${i}] must be 0 or the number of one of ${series.length} auxiliary series, got ${shown(s)}`)
    rows[i - first] = s
  }
}

/**
 * Where a history of `total` rows is cut so that at most `maxHistory` are left: by steps of an eighth of it, so that most requests of a
 * growing history keep their first row, and with it what is cached.
 */
export function historyCut(total: number, maxHistory: number): number {
  const stride = Math.max(1, maxHistory >> 3)
  return stride * Math.ceil(Math.max(0, total - maxHistory) / stride)
}

/**
 * Checks a request and copies it.
 * @throws HstuError ERR_HSTU_INVALID_ARGUMENT naming the field, and what it has to be.
 */
export function checkRequest(request: RankRequest, limits: RequestLimits): WireRequest {
  if (typeof request !== 'object' || request === null) fail(`expected a request, got ${shown(request)}`)
  const { tenant = '', user, history, candidates, context = {}, time } = request
  if (typeof tenant !== 'string') fail(`tenant must be text, got ${shown(tenant)}`)
  if (typeof history !== 'object' || history === null) fail(`history must be an object, got ${shown(history)}`)
  const { items, times, actions, series, start = 0 } = history
  readable(candidates, 'candidates')
  readable(items, 'history.items')
  readable(times, 'history.times')
  if (candidates.length === 0) fail('there are no candidates')
  if (candidates.length > limits.maxCandidates)
    fail(`${candidates.length} candidates are more than maxCandidates ${limits.maxCandidates}`)
  const beside = (array: unknown, name: string) => {
    if (array === undefined) return
    readable(array, name)
    if (array.length !== items.length) fail(`${name} has ${array.length} entries, history.items ${items.length}`)
  }
  beside(times, 'history.times')
  beside(actions, 'history.actions')
  beside(series, 'history.series')
  if (!(Number.isSafeInteger(start) && start >= 0)) fail(`history.start must be a count, got ${shown(start)}`)
  if (typeof context !== 'object' || context === null) fail(`context must be an object, got ${shown(context)}`)
  for (const name of Object.keys(context))
    if (!limits.contextual.includes(name))
      fail(`context has no feature ${shown(name)}; the model's are ${limits.contextual.join(', ') || 'none'}`)
  const cut = historyCut(start + items.length, limits.maxHistory)
  const first = Math.min(items.length, Math.max(0, cut - start))
  const rows = items.length - first
  const owner = idOf(user, 'user')
  const columns = columnsIn(new ArrayBuffer(ROW_BYTES * rows), rows)
  secondsOf(times, 'history.times', first, columns.times)
  const ids = idsOf(items, 'history.items', first)
  if (actions) putActions(columns.actions, actions, limits.actions, first)
  if (series) putSeries(columns.series, series, limits.series, first)
  return {
    tenant,
    user: owner,
    start: start + first,
    items: ids,
    times: columns.times,
    actions: columns.actions,
    series: columns.series,
    candidates: idsOf(candidates, 'candidates'),
    context: limits.contextual.map(name => {
      const id = context[name] ?? null
      return id === null ? null : idOf(id, `context.${name}`)
    }),
    time: time === undefined ? BigInt(Math.floor(Date.now() / 1000)) : second(time, 'time'),
  }
}

/** Of a request, without what it asks of it. */
export type WireHistory = Omit<WireRequest, 'candidates' | 'time'>

/** Rows of the same history in the same context: their requests can be one sequence. */
export function sameHistory(a: WireHistory, b: WireHistory): boolean {
  return (
    a.start === b.start &&
    sameColumns([a.times, a.actions, a.series], [b.times, b.actions, b.series]) &&
    sameIds(a.items, b.items) &&
    a.context.every((id, c) => id === b.context[c])
  )
}

/** Whose request it is. */
export const ownerText = ({ tenant, user }: Pick<WireRequest, 'tenant' | 'user'>) => `${tenant.length}:${tenant}${user}`

/** A history whose next item is asked for. */
export interface RetrieveRequest {
  history: {
    items: Ids
    /** Whole seconds; left out with a model that was trained without times. */
    times?: Numbers
  }
  /** How many items; default 10. */
  k?: number
  /** Ids of items that are left out in place of the history's. */
  exclude?: Ids
  /** Whole seconds; default now. */
  time?: number | bigint
}

/** A checked retrieval request. */
export interface WireRetrieval {
  items: WireIds
  times: BigInt64Array | null
  time: bigint
  exclude: WireIds | null
  k: number
}

const MOST_K = 65_536

/** As {@link checkRequest}; the history is cut to its last `maxHistory` rows, for no row of it is cached. */
export function checkRetrieval(request: RetrieveRequest, maxHistory: number): WireRetrieval {
  if (typeof request !== 'object' || request === null) fail(`expected a request, got ${shown(request)}`)
  const { history, k = 10, exclude, time } = request
  if (typeof history !== 'object' || history === null) fail(`history must be an object, got ${shown(history)}`)
  const { items, times } = history
  for (const [name, array] of Object.entries({ 'history.items': items, 'history.times': times, exclude }))
    if (array !== undefined || name === 'history.items') readable(array, name)
  if (items.length === 0) fail('history.items is empty')
  if (times && times.length !== items.length)
    fail(`history.times has ${times.length} entries, history.items ${items.length}`)
  if (!(Number.isInteger(k) && k >= 1 && k <= MOST_K))
    fail(`k must be a whole number in 1 .. ${MOST_K}, got ${shown(k)}`)
  const first = Math.max(0, items.length - maxHistory)
  return {
    items: idsOf(items, 'history.items', first),
    times: times ? secondsOf(times, 'history.times', first) : null,
    exclude: exclude ? idsOf(exclude, 'exclude') : null,
    ...{ k, time: time === undefined ? BigInt(Math.floor(Date.now() / 1000)) : second(time, 'time') },
  }
}
