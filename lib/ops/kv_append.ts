import { refuseInTape } from '../autograd.js'
import { argument, dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { Tensor } from '../tensor.js'

export interface KvAppendOptions {
  /** int64 [B + 1]: where each sequence's rows of `k` and `v` begin. */
  seqOffsets: Tensor
  /**
   * The cache, as `hstuAttention` takes it: `pages` [n, 2, S, H, max(D, V)], `pageTable` int32, a sequence's pages from `pageOffsets`
   * int64 [B + 1] on, `kvLengths` int32 [B]: the tokens that they hold before the call. `pages` of each layer where there are several.
   */
  paged: { pages: Tensor | readonly Tensor[]; pageTable: Tensor; pageOffsets: Tensor; kvLengths: Tensor }
  /** int32 [B]: only so many first rows of a sequence are written; default all. */
  counts?: Tensor | null
}

const list = (x: Tensor | readonly Tensor[]) => (x instanceof Tensor ? [x] : [...x]) as [Tensor, ...Tensor[]]

/**
 * Writes the keys and values of new tokens into a cache, in place: row r of sequence b at position kvLengths[b] + r, which is slot
 * position % S of the sequence's page position / S. No gradient.
 * @param k [T, H, D], of the pages' dtype; of each layer where there are several, all of one shape
 * @param v [T, H, V], likewise
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE; ERR_HSTU_INVALID_ARGUMENT for a page outside the tensor, a sequence with too few pages
 * and a page that two sequences write (CPU), also inside `valueAndGrad`.
 * @see Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (2023).
 */
export function kvAppend(
  k: Tensor | readonly Tensor[],
  v: Tensor | readonly Tensor[],
  { seqOffsets, paged, counts = null }: KvAppendOptions,
): void {
  const op = 'kv_append'
  const { pageTable, pageOffsets, kvLengths } = paged
  refuseInTape(op)
  const [keys, values, pages] = [list(k), list(v), list(paged.pages)]
  argument(op, keys.length > 0 && values.length === keys.length && pages.length === keys.length, () => {
    return `K of ${keys.length} layers, V of ${values.length}, pages of ${pages.length}`
  })
  const { T, H, D, V } = shapes(op, { k: [keys[0], ['T', 'H', 'D']], v: [values[0], ['T', 'H', 'V']] })
  const { S, P } = shapes(op, { pages: [pages[0], ['P', 2, 'S', H, Math.max(D, V)]], pageTable: [pageTable, ['n']] })
  const edges = shapes(op, { seqOffsets: [seqOffsets, ['B + 1']], pageOffsets: [pageOffsets, ['B + 1']] })['B + 1']
  argument(op, edges >= 1, () => 'seqOffsets must have B + 1 entries, got none')
  argument(op, S >= 1, () => 'pages must hold at least one slot')
  shapes(op, { kvLengths: [kvLengths, [edges - 1]], counts: [counts, [edges - 1]] })
  keys.forEach((key, i) => {
    const [value, own] = [values[i], pages[i]]
    shapes(op, { k: [key, [T, H, D]], v: [value, [T, H, V]], pages: [own, [P, 2, S, H, Math.max(D, V)]] })
    dtypes(op, { pages: pages[0], k: key, v: value, 'pages of another layer': own })
  })
  dtypes(op, { seqOffsets, pageOffsets }, 'int64')
  dtypes(op, { pageTable, kvLengths, counts }, 'int32')
  native.kv_append(pages, keys, values, seqOffsets, pageTable, pageOffsets, kvLengths, counts)
}
