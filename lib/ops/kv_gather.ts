import { argument, dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { Tensor } from '../tensor.js'

export interface KvGatherOptions {
  /** int64 [B + 1]: where each sequence's rows of the result begin; a sequence gets its first tokens, at most kvLengths[b]. */
  seqOffsets: Tensor
  /** T, the rows of all sequences together: given, so that the offsets need not be read back from the device. */
  rows: number
  /** D of the keys; the larger of D and V is the pages' last dim. */
  keyDim: number
  /** V of the values. */
  valueDim: number
}

/**
 * Reads keys and values back from a cache: row r of sequence b is position r, slot r % S of the sequence's page r / S. No gradient.
 * @param paged as `kvAppend` and `hstuAttention` take it, with `kvLengths` int32 [B]: the tokens that the pages hold
 * @returns k [T, H, D] and v [T, H, V], of the pages' dtype
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE; ERR_HSTU_INVALID_ARGUMENT for more rows than a sequence holds and for a page outside
 * the tensor (CPU).
 */
export function kvGather(
  paged: { pages: Tensor; pageTable: Tensor; pageOffsets: Tensor; kvLengths: Tensor },
  { seqOffsets, rows, keyDim, valueDim }: KvGatherOptions,
): { k: Tensor; v: Tensor } {
  const op = 'kv_gather'
  const { pages, pageTable, pageOffsets, kvLengths } = paged
  for (const [name, n] of Object.entries({ rows, keyDim, valueDim }))
    argument(op, Number.isSafeInteger(n) && n >= 0, () => `${name} ${n} is no count`)
  const { H, S } = shapes(op, { pages: [pages, ['pages', 2, 'S', 'H', Math.max(keyDim, valueDim)]] })
  const edges = shapes(op, { seqOffsets: [seqOffsets, ['B + 1']], pageOffsets: [pageOffsets, ['B + 1']] })['B + 1']
  argument(op, edges >= 1, () => 'seqOffsets must have B + 1 entries, got none')
  argument(op, S >= 1, () => 'pages must hold at least one slot')
  shapes(op, { kvLengths: [kvLengths, [edges - 1]], pageTable: [pageTable, ['n']] })
  dtypes(op, { pages })
  dtypes(op, { seqOffsets, pageOffsets }, 'int64')
  dtypes(op, { pageTable, kvLengths }, 'int32')
  const k = Tensor.empty([rows, H, keyDim], pages)
  const v = Tensor.empty([rows, H, valueDim], pages)
  native.kv_gather(k, v, pages, seqOffsets, pageTable, pageOffsets, kvLengths)
  return { k, v }
}
