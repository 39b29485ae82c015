import { refuseInTape } from '../autograd.js'
import { argument, dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { emptyLike, Tensor, type TensorOptions } from '../tensor.js'

/** A hash table from 64-bit keys to C rows, on a device; `hashLookup` changes its tensors in place. */
export interface HashIndex {
  /** int64 [C]: the key of each row; row 0 belongs to no key. */
  rowKeys: Tensor
  /** int64 [1]: rows given, row 0 included. */
  count: Tensor
  /** int32 [C]: the tick at which a row was last looked up; null where nobody asks. */
  lastUsed: Tensor | null
  /** int32 [S], S a power of two of at least 2 C: open addressing over `rowKeys`, rebuilt from it at any time. */
  slots: Tensor
}

export interface HashLookupOptions {
  /** Gives keys that have no row the next ones, in order of their first position. Needs as many free rows as there are keys. Default false. */
  insert?: boolean
  /** Written to `lastUsed` of the rows that were found or given. Default 0. */
  tick?: number
}

/** Slots without keys for an index of `rows` rows. */
export function emptySlots(rows: number, { device = 'cpu' }: TensorOptions = {}): Tensor {
  return Tensor.from(new Int32Array(2 ** Math.ceil(Math.log2(2 * rows))).fill(-1), undefined, { device })
}

/** An index without keys for `rows` rows, row 0 included. */
export function emptyHashIndex(rows: number, { device = 'cpu' }: TensorOptions = {}): HashIndex {
  argument('hashLookup', Number.isInteger(rows) && rows >= 1 && rows <= 2 ** 30, () => {
    return `an index has 1 to 2^30 rows, got ${rows}`
  })
  return {
    rowKeys: Tensor.zeros([rows], { dtype: 'int64', device }),
    count: Tensor.from(BigInt64Array.of(1n), [1], { device }),
    lastUsed: Tensor.zeros([rows], { dtype: 'int32', device }),
    slots: emptySlots(rows, { device }),
  }
}

/**
 * The rows of 64-bit keys: 0 for a key that has none, or with `insert` the next free one. Which row a key gets depends on the order of the
 * keys alone: the same on every device and run.
 * @param keys int64 [T], any values
 * @returns int64 [T]
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE; ERR_HSTU_INVALID_ARGUMENT where fewer rows are free than there are keys to insert (CPU;
 * on CUDA nothing is inserted), also inside `valueAndGrad`.
 */
export function hashLookup(
  index: HashIndex,
  keys: Tensor,
  { insert = false, tick = 0 }: HashLookupOptions = {},
): Tensor {
  const { rowKeys, count, lastUsed, slots } = index
  if (insert || lastUsed) refuseInTape('hashLookup')
  const { C, S } = shapes('hashLookup', {
    keys: [keys, ['T']],
    rowKeys: [rowKeys, ['C']],
    count: [count, [1]],
    lastUsed: [lastUsed, ['C']],
    slots: [slots, ['S']],
  })
  dtypes('hashLookup', { keys, rowKeys, count }, 'int64')
  dtypes('hashLookup', { lastUsed, slots }, 'int32')
  argument('hashLookup', S >= 2 * C && Number.isInteger(Math.log2(S)), () => {
    return `slots must be a power of two of at least twice the ${C} rows, got ${S}`
  })
  const rows = emptyLike(keys)
  native.hash_lookup(rows, slots, rowKeys, lastUsed, count, keys, insert, tick)
  return rows
}
