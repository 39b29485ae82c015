import { record } from '../autograd.js'
import { argument, dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import type { PhiloxPosition } from '../philox.js'
import { emptyLike, type Tensor } from '../tensor.js'

export interface NormGateLinearOptions {
  /** [d] */
  bias?: Tensor | null
  /** [H V] both, or neither. */
  normWeight?: Tensor | null
  normBias?: Tensor | null
  /** Default 1e-6. */
  eps?: number
  /** The input of w is [u, o, u LN(o)] instead of u LN(o). */
  concat?: boolean
  /** Probability of zeroing an element of the input of w, and the Philox position of the mask. */
  dropout?: number
  position?: PhiloxPosition
}

/**
 * The second half of an HSTU layer: y = x + dropout(u LN(o)) w + bias, LN over H V jointly (Zhai et al. 2024, eq. 3).
 * @param x [T, d], the residual, float32 or float64
 * @param u [T, H, V] the gate
 * @param o [T, H, V] the attention's output
 * @param w [H V, d], or [3 H V, d] with `concat`
 * @returns [T, d]
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE, ERR_HSTU_INVALID_ARGUMENT.
 */
export function normGateLinear(
  x: Tensor,
  u: Tensor,
  o: Tensor,
  w: Tensor,
  options: NormGateLinearOptions = {},
): Tensor {
  const { bias = null, normWeight = null, normBias = null, eps = 1e-6, concat = false, dropout = 0 } = options
  const { seed, offset, base = null } = options.position ?? { seed: 0n, offset: 0n }
  const op = 'normGateLinear'
  const { H, V } = shapes(op, { x: [x, ['T', 'd']], u: [u, ['T', 'H', 'V']], o: [o, ['T', 'H', 'V']] })
  const width = H * V
  shapes(op, {
    w: [w, [(concat ? 3 : 1) * width, x.shape[1]!]],
    bias: [bias, [x.shape[1]!]],
    normWeight: [normWeight, [width]],
    normBias: [normBias, [width]],
    base: [base, [1]],
  })
  dtypes(op, { x, u, o, w, bias, normWeight, normBias })
  dtypes(op, { base }, 'int64')
  argument(op, !normWeight === !normBias, () => 'normWeight and normBias go together')
  argument(op, dropout >= 0 && dropout < 1, () => `dropout must be in [0, 1), got ${dropout}`)
  argument(op, dropout === 0 || options.position !== undefined, () => 'dropout needs a position in the Philox stream')
  const y = emptyLike(x)
  native.norm_gate_linear(y, x, u, o, w, bias, normWeight, normBias, eps, concat, dropout, seed, offset, base)
  return record(op, y, [x, u, o, w, bias, normWeight, normBias], dy => {
    const [du, dattn, dw] = [emptyLike(u), emptyLike(o), emptyLike(w)]
    const [dbias, dnormWeight, dnormBias] = [bias, normWeight, normBias].map(tensor => tensor && emptyLike(tensor))
    native.norm_gate_linear_backward(
      ...([du, dattn, dw, dbias!, dnormWeight!, dnormBias!, dy!] as const),
      ...([u, o, w, normWeight, normBias, eps, concat, dropout, seed, offset, base] as const),
    )
    return [dy, du, dattn, dw, dbias!, dnormWeight!, dnormBias!]
  })
}
