import { check } from '../errors.js'
import type { SequenceDataset } from './dataset.js'
import { heldOut, type SplitProtocol, type TrainPart } from './split.js'

/**
 * A jagged batch ready to be copied into tensors: B users, T rows in all, user b owns rows `offsets[b] .. offsets[b+1]`.
 * Every user has at least one row.
 */
export interface Batch {
  /** [B] dataset user indices; users too short to give a row have been left out. */
  users: Int32Array
  /** [T] internal item ids of the kept history */
  ids: BigInt64Array
  /** [T] seconds */
  times: BigInt64Array | null
  /** [T] seconds: time of the NEXT action; on a user's last row that of the target, or of the request. */
  queryTimes: BigInt64Array | null
  /** [B + 1] */
  offsets: BigInt64Array
  /** [T] next item id; 0 where there is none (the last row of a request). */
  targets: BigInt64Array
  /** [T] 1 where the row is supervised, else 0 */
  weights: Float32Array
  /** [B] index of each user's last row */
  lastRows: BigInt64Array
  /** Most rows that a user has in this batch. */
  maxLength: number
}

/** Items that ranking must leave out: jagged, those of user b at `excludeOffsets[b] .. excludeOffsets[b+1]`. */
export interface Exclusions {
  /** internal item ids, each once a user */
  excludeIds: BigInt64Array
  /** [B + 1] */
  excludeOffsets: BigInt64Array
}

/** @see evalBatch */
export interface EvalBatch extends Batch, Exclusions {
  /** [B] the item to be ranked */
  targetIds: BigInt64Array
}

/** @see requestBatch */
export interface RetrievalBatch extends Batch, Exclusions {}

/**
 * What ranking leaves out. `'history'`: the items of the kept history; `'all'`: every item that the user has at any
 * time, later ones too; `'none'`. The target itself always stays.
 */
export type FilterSeen = 'history' | 'all' | 'none'

/**
 * Next-item training on the last `maxLength` actions before the last target of the training part; every row is
 * supervised.
 *
 * `part` (also accepted as `protocol`) says what the training part is: under `'valid'` the target of the last row is
 * `s_{T-3}`, under `'paper'` `s_{T-2}`, under `'all'` `s_{T-1}`. Users with fewer than two actions in it are left out.
 *
 * @throws HstuError ERR_HSTU_INVALID_ARGUMENT for an unknown user or `maxLength` < 1.
 */
export function trainBatch(
  dataset: SequenceDataset,
  users: ArrayLike<number>,
  options: { maxLength: number; protocol?: TrainPart },
): Batch {
  const skip = heldOut(options.protocol ?? 'valid') + 1
  const plan = planRows(dataset, users, options.maxLength, skip)
  const batch = gather(dataset, plan)
  batch.weights.fill(1)
  return batch
}

/**
 * Ranking of one target a user: `s_{T-2}` at stage `'valid'`, `s_{T-1}` at `'test'`. The history is the last
 * `maxLength` actions before the target, so at `'test'` it ends with the validation target. Only each user's last row
 * is supervised. Users without any action before the target are left out.
 *
 * @throws HstuError ERR_HSTU_INVALID_ARGUMENT for an unknown user, `maxLength` < 1, or stage `'valid'` under
 *   `protocol: 'paper'`, which trains on that action.
 */
export function evalBatch(
  dataset: SequenceDataset,
  users: ArrayLike<number>,
  options: { maxLength: number; stage: 'valid' | 'test'; protocol?: SplitProtocol; filterSeen?: FilterSeen },
): EvalBatch {
  const { stage, protocol = 'valid', filterSeen = 'history' } = options
  check(
    stage === 'test' || protocol === 'valid',
    'ERR_HSTU_INVALID_ARGUMENT',
    () => `stage 'valid' needs protocol 'valid': protocol '${protocol}' trains on the last action but one`,
  )
  const plan = planRows(dataset, users, options.maxLength, stage === 'valid' ? 2 : 1)
  const batch = gather(dataset, plan)
  const targetIds = new BigInt64Array(plan.users.length)
  const low = new Int32Array(targetIds.buffer)
  for (let b = 0; b < plan.users.length; b++) {
    low[2 * b] = dataset.items[plan.ends[b]!]!
    batch.weights[Number(batch.lastRows[b]!)] = 1
  }
  return { ...batch, ...exclusions(dataset, plan, filterSeen, true), targetIds }
}

/**
 * Recommendation after a user's last action: the last `maxLength` actions, nothing supervised. The last row's target
 * is 0 and its query time is `queryTimes[k]` for `users[k]`, by default the time of the last action;
 * a dataset without times has no use for query times and ignores them.
 *
 * @throws HstuError ERR_HSTU_INVALID_ARGUMENT for an unknown user, `maxLength` < 1, or `queryTimes` of another length.
 */
export function requestBatch(
  dataset: SequenceDataset,
  users: ArrayLike<number>,
  options: { maxLength: number; queryTimes?: ArrayLike<number | bigint>; filterSeen?: FilterSeen },
): RetrievalBatch {
  const { queryTimes, filterSeen = 'history' } = options
  check(
    !queryTimes || queryTimes.length === users.length,
    'ERR_HSTU_INVALID_ARGUMENT',
    () => `queryTimes has ${queryTimes!.length} entries for ${users.length} users`,
  )
  const plan = planRows(dataset, users, options.maxLength, 0)
  const batch = gather(dataset, plan)
  if (queryTimes && batch.queryTimes) {
    for (let b = 0; b < plan.users.length; b++) {
      batch.queryTimes[Number(batch.lastRows[b]!)] = BigInt(queryTimes[plan.positions[b]!]!)
    }
  }
  return { ...batch, ...exclusions(dataset, plan, filterSeen, false) }
}

/** Which dataset rows a batch takes: user b takes `starts[b] .. ends[b]`. */
interface RowPlan {
  users: Int32Array
  /** Index into the caller's list of users. */
  positions: Int32Array
  starts: Int32Array
  ends: Int32Array
  total: number
}

/** The last `maxLength` rows before the user's last `skip` ones. */
function planRows(dataset: SequenceDataset, users: ArrayLike<number>, maxLength: number, skip: number): RowPlan {
  check(
    Number.isInteger(maxLength) && maxLength > 0,
    'ERR_HSTU_INVALID_ARGUMENT',
    () => `maxLength must be a positive integer, got ${maxLength}`,
  )
  const kept = new Int32Array(users.length)
  const positions = new Int32Array(users.length)
  const starts = new Int32Array(users.length)
  const ends = new Int32Array(users.length)
  let count = 0
  let total = 0
  for (let k = 0; k < users.length; k++) {
    const u = users[k]!
    check(
      Number.isInteger(u) && u >= 0 && u < dataset.numUsers,
      'ERR_HSTU_INVALID_ARGUMENT',
      () => `user ${u} is not one of the dataset's users 0 .. ${dataset.numUsers - 1}`,
    )
    const end = dataset.offsets[u + 1]! - skip
    const start = Math.max(dataset.offsets[u]!, end - maxLength)
    if (start >= end) continue
    kept[count] = u
    positions[count] = k
    starts[count] = start
    ends[count++] = end
    total += end - start
  }
  return {
    users: kept.slice(0, count),
    positions: positions.slice(0, count),
    starts: starts.slice(0, count),
    ends: ends.slice(0, count),
    total,
  }
}

/**
 * Item ids are written through 32-bit views: a BigInt an element costs more than the rest of the batch. The low word
 * comes first on every platform that Node's builds for this package run on, and ids are never negative.
 */
function gather(dataset: SequenceDataset, plan: RowPlan): Batch {
  const { users, starts, ends, total } = plan
  const ids = new BigInt64Array(total)
  const targets = new BigInt64Array(total)
  const times = dataset.times ? new BigInt64Array(total) : null
  const queryTimes = dataset.times ? new BigInt64Array(total) : null
  const offsets = new BigInt64Array(users.length + 1)
  const lastRows = new BigInt64Array(users.length)
  const idsLow = new Int32Array(ids.buffer)
  const targetsLow = new Int32Array(targets.buffer)
  let at = 0
  let maxLength = 0
  for (let b = 0; b < users.length; b++) {
    const start = starts[b]!
    const end = ends[b]!
    const length = end - start
    const userEnd = dataset.offsets[users[b]! + 1]!
    for (let k = 0; k < length; k++) {
      const row = start + k
      idsLow[2 * (at + k)] = dataset.items[row]!
      if (row + 1 < userEnd) targetsLow[2 * (at + k)] = dataset.items[row + 1]!
    }
    if (dataset.times && times && queryTimes) {
      times.set(dataset.times.subarray(start, end), at)
      queryTimes.set(dataset.times.subarray(start + 1, Math.min(end + 1, userEnd)), at)
      if (end === userEnd) queryTimes[at + length - 1] = dataset.times[end - 1]!
    }
    at += length
    offsets[b + 1] = BigInt(at)
    lastRows[b] = BigInt(at - 1)
    maxLength = Math.max(maxLength, length)
  }
  return { users, ids, times, queryTimes, offsets, targets, weights: new Float32Array(total), lastRows, maxLength }
}

function exclusions(dataset: SequenceDataset, plan: RowPlan, filter: FilterSeen, hasTarget: boolean): Exclusions {
  const { users, starts, ends } = plan
  const excludeOffsets = new BigInt64Array(users.length + 1)
  if (filter === 'none') return { excludeIds: new BigInt64Array(0), excludeOffsets }
  const all = filter === 'all'
  let bound = 0
  for (let b = 0; b < users.length; b++) {
    bound += all ? dataset.offsets[users[b]! + 1]! - dataset.offsets[users[b]!]! : ends[b]! - starts[b]!
  }
  const found = new BigInt64Array(bound)
  const low = new Int32Array(found.buffer)
  // The last user that marked an item, plus one: no clearing between users.
  const marks = new Int32Array(dataset.numItems + 1)
  let at = 0
  for (let b = 0; b < users.length; b++) {
    const from = all ? dataset.offsets[users[b]!]! : starts[b]!
    const to = all ? dataset.offsets[users[b]! + 1]! : ends[b]!
    if (hasTarget) marks[dataset.items[ends[b]!]!] = b + 1
    for (let row = from; row < to; row++) {
      const item = dataset.items[row]!
      if (marks[item] === b + 1) continue
      marks[item] = b + 1
      low[2 * at++] = item
    }
    excludeOffsets[b + 1] = BigInt(at)
  }
  return { excludeIds: found.slice(0, at), excludeOffsets }
}
