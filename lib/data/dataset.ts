import type { SplitProtocol } from './split.js'

export * from './batch.js'
export * from './split.js'

/** What the loader met on the way; every count is over the whole file. */
export interface DatasetStats {
  /** Actions read, those of skipped users included. */
  rows: number
  /** Users with fewer than `minActions` actions: left out. */
  skippedUsers: number
  /** Actions of skipped users. */
  skippedActions: number
  /**
   * Kept actions that do not stand where their time puts them: for tables, rows that sorting by time moved behind a
   * later row of the file; for sequence files, whose order is kept, actions earlier than the one before.
   */
  outOfOrder: number
  minActions: number
  /** Suspicious, not wrong: times that look like milliseconds, fractions of a second cut off. */
  warnings: string[]
}

/**
 * Users' actions in time order, jagged: user `u` owns rows `offsets[u] .. offsets[u + 1]`.
 *
 * Users and items are numbered by first appearance among the kept actions of the file, so that the same file always
 * gives the same numbers. Items have internal ids `1 .. numItems`; 0 is padding.
 */
export interface SequenceDataset {
  name: string
  numUsers: number
  numItems: number
  /** External id of user `u`, exactly as in the file: 64-bit ids stay strings. */
  userIds: string[]
  /** External id of item `i`; `itemIds[0]` is `''`. */
  itemIds: string[]
  /** [numUsers + 1] */
  offsets: Int32Array
  /** [T] internal item ids */
  items: Int32Array
  /** [T] whole seconds; null if the file has no times. */
  times: BigInt64Array | null
  /** [T] null if the file has no ratings. */
  ratings: Float32Array | null
  stats: DatasetStats
}

/** Number of actions of user `u`. */
export function userLength(dataset: SequenceDataset, user: number): number {
  return dataset.offsets[user + 1]! - dataset.offsets[user]!
}

/**
 * How often each item occurs, leaving out the last `untilFromEnd` actions of every user.
 *
 * With `untilFromEnd` = 2 (`protocol: 'valid'`) or 1 (`'paper'`) these are the counts of the training part alone, as
 * the popularity baseline needs them.
 *
 * @returns [numItems + 1]; entry 0 (padding) is 0.
 */
export function itemCounts(dataset: SequenceDataset, untilFromEnd: number | SplitProtocol = 0): Float64Array {
  const skip = typeof untilFromEnd === 'number' ? untilFromEnd : untilFromEnd === 'valid' ? 2 : 1
  const counts = new Float64Array(dataset.numItems + 1)
  for (let u = 0; u < dataset.numUsers; u++) {
    const end = dataset.offsets[u + 1]! - skip
    for (let row = dataset.offsets[u]!; row < end; row++) counts[dataset.items[row]!]!++
  }
  return counts
}
