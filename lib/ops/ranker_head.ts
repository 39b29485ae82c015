import { isTracked } from '../autograd.js'
import { argument, dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { Tensor } from '../tensor.js'

export interface RankerHeadOptions {
  /** int64 [M]: the candidates' rows of x */
  rows: Tensor
  /** int64 [G + 1]: where each request's candidates begin */
  groups: Tensor
  /** What the states are made of: int64 [G], each request's row of x, and where they go; or the states themselves, [G, hidden]. */
  states: { last: Tensor; into?: Tensor | null } | { known: Tensor }
  /** [d, hidden] */
  stateWeight: Tensor
  /** Of a `SwishMlp`. */
  mlp: {
    hidden: Tensor
    hiddenBias: Tensor
    swishWeight: Tensor
    swishBias: Tensor
    output: Tensor
    outputBias: Tensor
  }
  /** Default 1e-6. */
  eps?: number
}

/**
 * Logits of candidates: y_m = (z sigmoid(LN(z))) W_2 + b_2 with z = x[rows_m] W_1 + b_1 + s_b, where s_b = x[last_b] W_s is the state of the
 * candidate's request. The bits of `embedding`, `cast`, `linear`, `expand` and `swishLayerNorm` one after the other. No gradient.
 * @param x [R, d]: of the parameters' dtype, or 16-bit beside float32 ones
 * @returns logits [M, K] and states [G, hidden]
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE; ERR_HSTU_INVALID_ARGUMENT for a row out of range (CPU), also inside `valueAndGrad`.
 */
export function rankerHead(x: Tensor, options: RankerHeadOptions): { logits: Tensor; states: Tensor } {
  const op = 'ranker_head'
  const { rows, groups, states, stateWeight, mlp, eps = 1e-6 } = options
  const { d } = shapes(op, { x: [x, ['R', 'd']] })
  const { hidden, K } = shapes(op, { hidden: [mlp.hidden, [d, 'hidden']], output: [mlp.output, ['hidden', 'K']] })
  const { edges } = shapes(op, { groups: [groups, ['edges']], rows: [rows, ['M']] })
  argument(op, edges >= 1, () => 'groups must have G + 1 entries, got none')
  const of =
    'known' in states ? { known: states.known, last: null, into: null } : { known: null, into: null, ...states }
  shapes(op, { stateWeight: [stateWeight, [d, hidden]], outputBias: [mlp.outputBias, [K]] })
  shapes(op, { known: [of.known ?? of.into, [edges - 1, hidden]], last: [of.last, [edges - 1]] })
  for (const name of ['hiddenBias', 'swishWeight', 'swishBias'] as const) shapes(op, { [name]: [mlp[name], [hidden]] })
  dtypes(op, { ...mlp, stateWeight, known: of.known, into: of.into })
  dtypes(op, { rows, groups, last: of.last }, 'int64')
  if (x.dtype !== 'bfloat16' && x.dtype !== 'float16') dtypes(op, { hidden: mlp.hidden, x })
  const tracked = isTracked(x, stateWeight, ...Object.values(mlp))
  argument(op, !tracked, () => 'takes no gradient: call it outside valueAndGrad')
  const logits = Tensor.empty([rows.size, K], mlp.hidden)
  const made = of.known ? null : (of.into ?? Tensor.empty([edges - 1, hidden], mlp.hidden))
  native.ranker_head(
    ...([logits, made, of.known, x, rows, of.last, groups, stateWeight, mlp.hidden, mlp.hiddenBias] as const),
    ...([mlp.swishWeight, mlp.swishBias, mlp.output, mlp.outputBias, eps] as const),
  )
  return { logits, states: made ?? of.known! }
}
