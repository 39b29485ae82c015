import { check } from '../errors.js'
import type { SequenceDataset } from './dataset.js'

/**
 * How a user's actions `s_0 .. s_{T-1}` are divided.
 *
 * - `'valid'` (default everywhere): train on `s_0 .. s_{T-3}`, validate on `s_{T-2}`, test on `s_{T-1}`.
 * - `'paper'`: train on `s_0 .. s_{T-2}`, test on `s_{T-1}`; nothing is left to choose the best epoch on, so whoever
 *   reports such numbers has to say so.
 */
export type SplitProtocol = 'valid' | 'paper'

/** What is trained on: the training part of a protocol, or `'all'` actions (final models, synthetic streams). */
export type TrainPart = SplitProtocol | 'all'

/** Number of actions at a user's end that training must not see. */
export function heldOut(part: TrainPart): number {
  return part === 'valid' ? 2 : part === 'paper' ? 1 : 0
}

/** Where the parts of one user lie, as row indices of `dataset.items`. */
export interface SplitBounds {
  /** First row of the user. */
  start: number
  /** One past the last training row. */
  trainEnd: number
  /** Row of the validation target; -1 where the protocol has none or the user is too short. */
  valid: number
  /** Row of the test target. */
  test: number
}

/** Rows of user `u` under `protocol`. A part that the user is too short for is empty or -1. */
export function splitBounds(dataset: SequenceDataset, user: number, protocol: SplitProtocol = 'valid'): SplitBounds {
  check(
    Number.isInteger(user) && user >= 0 && user < dataset.numUsers,
    'ERR_HSTU_INVALID_ARGUMENT',
    () => `user ${user} is not one of the dataset's users 0 .. ${dataset.numUsers - 1}`,
  )
  const start = dataset.offsets[user]!
  const end = dataset.offsets[user + 1]!
  return {
    start,
    trainEnd: Math.max(start, end - heldOut(protocol)),
    valid: protocol === 'valid' && end - start >= 2 ? end - 2 : -1,
    test: end > start ? end - 1 : -1,
  }
}

/** Users whose training part has a next action to learn from, that is at least two actions; ascending. */
export function trainableUsers(dataset: SequenceDataset, part: TrainPart = 'valid'): Int32Array {
  return usersWithAtLeast(dataset, heldOut(part) + 2)
}

/** Users that have an action before the target of `stage`, hence a history to rank from; ascending. */
export function evaluableUsers(dataset: SequenceDataset, stage: 'valid' | 'test'): Int32Array {
  return usersWithAtLeast(dataset, stage === 'valid' ? 3 : 2)
}

function usersWithAtLeast(dataset: SequenceDataset, length: number): Int32Array {
  const users = new Int32Array(dataset.numUsers)
  let count = 0
  for (let u = 0; u < dataset.numUsers; u++) {
    if (dataset.offsets[u + 1]! - dataset.offsets[u]! >= length) users[count++] = u
  }
  return users.slice(0, count)
}

/**
 * One epoch over `users` in batches of `batchSize`; the last may be smaller.
 *
 * @param users  a list of user indices, or n for `0 .. n-1`
 * @param rng  uniform numbers in [0, 1): the order is a Fisher-Yates shuffle by it, hence a function of its state
 *   alone. Without it the order is that of `users`.
 * @throws HstuError ERR_HSTU_INVALID_ARGUMENT if `batchSize` is not a positive integer.
 */
export function* epochBatches(
  users: number | ArrayLike<number>,
  batchSize: number,
  rng?: (() => number) | null,
): Generator<Int32Array, void, undefined> {
  check(
    Number.isInteger(batchSize) && batchSize > 0,
    'ERR_HSTU_INVALID_ARGUMENT',
    () => `batchSize must be a positive integer, got ${batchSize}`,
  )
  const order = typeof users === 'number' ? Int32Array.from({ length: users }, (_, u) => u) : Int32Array.from(users)
  if (rng) {
    for (let i = order.length - 1; i > 0; i--) {
      const j = Math.floor(rng() * (i + 1))
      const swap = order[i]!
      order[i] = order[j]!
      order[j] = swap
    }
  }
  for (let start = 0; start < order.length; start += batchSize) yield order.slice(start, start + batchSize)
}
