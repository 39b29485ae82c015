import { inDtypeOf, isTracked, record } from '../autograd.js'
import { argument, dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { emptyLike, Tensor } from '../tensor.js'

export interface HstuAttentionOptions {
  /** int64 [B + 1]: where each sequence's rows of `k` and `v` begin (and of `q`, unless `qOffsets`). */
  seqOffsets: Tensor
  /** The longest key length. */
  maxSeqLen: number
  /** int64 [B + 1]: rows of `q` where queries are fewer than keys; they are the last rows of their sequence. */
  qOffsets?: Tensor | null
  /** int32 [B]: how many of a sequence's last tokens are targets, which see the history and their own group. */
  numTargets?: Tensor | null
  /** Contextual tokens at the start of each sequence: one number, or int32 [B]. */
  contextual?: number | Tensor
  /** Position bias [1 or H, P], float32 or of q's dtype. */
  posW?: Tensor | null
  /** Time bias [1 or H, NB + 1], float32 or of q's dtype, with `queryTime` int64 [Tq] and `keyTime` int64 [Tk], in whole seconds. */
  timeW?: Tensor | null
  queryTime?: Tensor | null
  keyTime?: Tensor | null
  /** Factor of each output row, required for silu: a number (usually 1 / N with N fixed by the model) or float32 [Tq]. */
  scale?: number | Tensor
  /** Factor of the scores before the bias; default 1. */
  alpha?: number
  /** Default true. */
  causal?: boolean
  /** Window W: rows see at most this many positions back; 0 (default) is no window. */
  maxAttnLen?: number
  /** The last F history rows, and all targets, ignore the window. */
  minFullAttnSeqLen?: number
  /** Targets are visible to later ones of their group of this size; default 1, themselves only. */
  targetGroupSize?: number
  /** Contextual rows see the whole history. */
  contextualFull?: boolean
  activation?: 'silu' | 'softmax'
  /** Probability of dropping a softmax weight, drawn by Philox from `seed` and `offset`. */
  dropout?: number
  seed?: bigint
  offset?: bigint
  /** A row's bits do not depend on batch or cache, and gradients are bit-equal from run to run; default true, else by rounding. */
  deterministic?: boolean
  /**
   * History in a cache, before the rows of `k` and `v`: `pages` [n, 2, S, H, max(D, V)], `pageTable` int32, a sequence's pages from
   * `pageOffsets` int64 [B + 1] on, `kvLengths` int32 [B]; `timeOffsets` int64 [B + 1]: where its keys' times begin in `keyTime`.
   */
  paged?: { pages: Tensor; pageTable: Tensor; pageOffsets: Tensor; kvLengths: Tensor; timeOffsets?: Tensor }
}

/**
 * HSTU attention over jagged sequences (Zhai et al. 2024, arXiv 2402.17152, eq. 2-3): scores s = alpha q k^T + bias, weights silu(s) or
 * softmax(s) where the mask lets a row see, output scale * weights v. The bias comes from two small tables; no N x N tensor exists.
 * @param q [Tq, H, D], float32 or float64
 * @param k [Tk, H, D]
 * @param v [Tk, H, V]; D and V at most 256
 * @returns [Tq, H, V]; a row that sees nothing gives 0
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE, ERR_HSTU_INVALID_ARGUMENT (also for more targets or queries than keys).
 */
export function hstuAttention(q: Tensor, k: Tensor, v: Tensor, options: HstuAttentionOptions): Tensor {
  const op = 'hstu_attention'
  const { seqOffsets, maxSeqLen, paged, scale, activation = 'silu', dropout = 0, alpha = 1, contextual = 0 } = options
  const { qOffsets = null, numTargets = null, posW = null, timeW = null, queryTime = null, keyTime = null } = options
  const { maxAttnLen = 0, minFullAttnSeqLen = 0, targetGroupSize = 1, causal = true, contextualFull = false } = options
  const { seed = 0n, offset = 0n, deterministic = true } = options
  const { pages = null, pageTable = null, pageOffsets = null, kvLengths = null, timeOffsets = null } = paged ?? {}
  const scales = scale instanceof Tensor ? scale : null
  const contextualLengths = contextual instanceof Tensor ? contextual : null
  const wants = (condition: boolean, message: string) => argument(op, condition, () => message)
  const dims = shapes(op, { q: [q, ['Tq', 'H', 'D']], k: [k, ['Tk', 'H', 'D']], v: [v, ['Tk', 'H', 'V']] })
  wants(Math.min(dims.D, dims.V) >= 1 && Math.max(dims.D, dims.V) <= 256, `D=${dims.D}, V=${dims.V} must be 1 to 256`)
  shapes(op, { seqOffsets: [seqOffsets, ['B + 1']] })
  wants(seqOffsets.size >= 1, 'seqOffsets must have B + 1 entries, got none')
  const B = seqOffsets.size - 1
  const edges = [B + 1]
  shapes(op, { qOffsets: [qOffsets, edges], pageOffsets: [pageOffsets, edges], timeOffsets: [timeOffsets, edges] })
  shapes(op, { numTargets: [numTargets, [B]], contextual: [contextualLengths, [B]], kvLengths: [kvLengths, [B]] })
  shapes(op, { scale: [scales, [dims.Tq]], queryTime: [queryTime, [dims.Tq]], pageTable: [pageTable, ['n']] })
  shapes(op, { keyTime: [keyTime, paged ? ['all keys'] : [dims.Tk]], posW: [posW, ['Hr', 'P']] })
  shapes(op, { timeW: [timeW, ['Hr', 'NB + 1']], pages: [pages, ['pages', 2, 'S', dims.H, Math.max(dims.D, dims.V)]] })
  for (const [name, table] of Object.entries({ posW, timeW })) {
    const fits = !table || ((table.shape[0] === 1 || table.shape[0] === dims.H) && table.shape[1]! >= 1)
    wants(fits, `${name} must have shape [1 or ${dims.H}, at least 1], got [${table?.shape.join(', ')}]`)
    if (table?.dtype !== 'float32' || q.dtype === 'float64') dtypes(op, { q, [name]: table })
  }
  dtypes(op, { q, k, v, pages })
  dtypes(op, { seqOffsets, qOffsets, queryTime, keyTime, pageOffsets, timeOffsets }, 'int64')
  dtypes(op, { numTargets, contextual: contextualLengths, pageTable, kvLengths }, 'int32')
  dtypes(op, { scale: scales }, 'float32')
  const softmax = activation === 'softmax'
  const tracks = isTracked(q, k, v, posW, timeW)
  const fixed = typeof contextual === 'number' ? contextual : 0
  wants(softmax || scale !== undefined, 'scale is required for silu (usually 1 / N with N fixed by the model)')
  wants(!timeW || (queryTime !== null && keyTime !== null), 'timeW needs queryTime and keyTime')
  wants(!timeW || !paged || timeOffsets !== null, 'timeW with paged needs paged.timeOffsets')
  wants(!paged || pages!.shape[2]! >= 1, 'pages must hold at least one slot')
  wants(!paged || !tracks, 'paged history takes no gradient: call it outside valueAndGrad')
  wants(dropout >= 0 && dropout < 1 && (softmax || dropout === 0), `dropout ${dropout} must be in [0, 1), 0 for silu`)
  const counts = { maxSeqLen, contextual: fixed, maxAttnLen, minFullAttnSeqLen, targetGroupSize }
  for (const [name, n] of Object.entries(counts))
    wants(Number.isSafeInteger(n) && n >= Number(name === 'targetGroupSize'), `${name} ${n} is no count`)
  const sums = { dtype: q.dtype === 'float64' ? q.dtype : 'float32', device: q.device } as const // of lse and the tables' gradients
  const factor = typeof scale === 'number' ? scale : 1
  const out = Tensor.empty([dims.Tq, dims.H, dims.V], q)
  const lse = softmax && tracks ? Tensor.empty([dims.Tq, dims.H], sums) : null
  // biome-ignore format: one line a group of ops.h
  native.hstu_attention(out, lse, q, k, v, seqOffsets, qOffsets, numTargets, contextualLengths, posW, timeW, queryTime, keyTime, scales,
    pages, pageTable, pageOffsets, kvLengths, timeOffsets, BigInt(maxSeqLen), fixed, maxAttnLen, minFullAttnSeqLen, targetGroupSize,
    causal, contextualFull, activation, alpha, factor, dropout, seed, offset, deterministic)
  return record(op, out, [q, k, v, posW, timeW], dout => {
    const [dq, dk, dv] = [emptyLike(q), emptyLike(k), emptyLike(v)]
    const sumOf = (table: Tensor | null) => (table && isTracked(table) ? Tensor.empty(table.shape, sums) : null)
    const [dpos, dtime] = [sumOf(posW), sumOf(timeW)]
    // biome-ignore format: as above
    native.hstu_attention_backward(dq, dk, dv, dpos, dtime, dout!, q, k, v, lse && out, lse, seqOffsets, qOffsets, numTargets,
      contextualLengths, posW, timeW, queryTime, keyTime, scales, BigInt(maxSeqLen), fixed, maxAttnLen, minFullAttnSeqLen,
      targetGroupSize, causal, contextualFull, activation, alpha, factor, dropout, seed, offset, deterministic)
    return [dq, dk, dv, dpos && inDtypeOf(posW!, dpos), dtime && inDtypeOf(timeW!, dtime)]
  })
}
