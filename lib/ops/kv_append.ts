import { refuseInTape } from '../autograd.js'
import { argument, dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import type { Tensor } from '../tensor.js'

export interface KvAppendOptions {
  /** int64 [B + 1]: where each sequence's rows of `k` and `v` begin. */
  seqOffsets: Tensor
  /**
   * The cache, as `hstuAttention` takes it: `pages` [n, 2, S, H, max(D, V)], `pageTable` int32, a sequence's pages from `pageOffsets`
   * int64 [B + 1] on, `kvLengths` int32 [B]: the tokens that they hold before the call.
   */
  paged: { pages: Tensor; pageTable: Tensor; pageOffsets: Tensor; kvLengths: Tensor }
  /** int32 [B]: only so many first rows of a sequence are written; default all. */
  counts?: Tensor | null
}

/**
 * Writes the keys and values of new tokens into a cache, in place: row r of sequence b at position kvLengths[b] + r, which is slot
 * position % S of the sequence's page position / S. No gradient.
 * @param k [T, H, D], of the pages' dtype
 * @param v [T, H, V]
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE; ERR_HSTU_INVALID_ARGUMENT for a page outside the tensor, a sequence with too few pages
 * and a page that two sequences write (CPU), also inside `valueAndGrad`.
 * @see Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (2023).
 */
export function kvAppend(k: Tensor, v: Tensor, { seqOffsets, paged, counts = null }: KvAppendOptions): void {
  const op = 'kv_append'
  const { pages, pageTable, pageOffsets, kvLengths } = paged
  refuseInTape(op)
  const { H, D, V } = shapes(op, { k: [k, ['T', 'H', 'D']], v: [v, ['T', 'H', 'V']] })
  const { S } = shapes(op, { pages: [pages, ['pages', 2, 'S', H, Math.max(D, V)]], pageTable: [pageTable, ['n']] })
  const edges = shapes(op, { seqOffsets: [seqOffsets, ['B + 1']], pageOffsets: [pageOffsets, ['B + 1']] })['B + 1']
  argument(op, edges >= 1, () => 'seqOffsets must have B + 1 entries, got none')
  argument(op, S >= 1, () => 'pages must hold at least one slot')
  shapes(op, { v: [v, [k.shape[0]!, H, V]], kvLengths: [kvLengths, [edges - 1]], counts: [counts, [edges - 1]] })
  dtypes(op, { pages, k, v })
  dtypes(op, { seqOffsets, pageOffsets }, 'int64')
  dtypes(op, { pageTable, kvLengths, counts }, 'int32')
  native.kv_append(pages, k, v, seqOffsets, pageTable, pageOffsets, kvLengths, counts)
}
