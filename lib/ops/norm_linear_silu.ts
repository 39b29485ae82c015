import { isTracked, record } from '../autograd.js'
import { argument, dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { emptyLike, Tensor } from '../tensor.js'

export interface NormLinearSiluOptions {
  heads: number
  /** D, head dim of q and k. */
  qkDim: number
  /** V, head dim of u and v. */
  vDim: number
  /** [2 H V + 2 H D] */
  bias?: Tensor | null
  /** [d] both, or neither. */
  normWeight?: Tensor | null
  normBias?: Tensor | null
  /** Default 1e-6. */
  eps?: number
  /** SiLU on u, v, q and k (default, the research form) or on u alone. */
  siluAll?: boolean
}

/**
 * The first half of an HSTU layer: u, v, q, k = silu(LN(x) w + bias), split by columns in this order
 * (Zhai et al. 2024, eq. 1).
 * @param x [T, d], float32 or float64
 * @param w [d, 2 H V + 2 H D]
 * @returns u [T, H, V], v [T, H, V], q [T, H, D], k [T, H, D]
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE, ERR_HSTU_INVALID_ARGUMENT.
 */
export function normLinearSilu(
  x: Tensor,
  w: Tensor,
  options: NormLinearSiluOptions,
): { u: Tensor; v: Tensor; q: Tensor; k: Tensor } {
  const { heads, qkDim, vDim, bias = null, normWeight = null, normBias = null, eps = 1e-6, siluAll = true } = options
  const op = 'normLinearSilu'
  const columns = 2 * heads * (vDim + qkDim)
  const { T } = shapes(op, {
    x: [x, ['T', 'd']],
    w: [w, ['d', columns]],
    bias: [bias, [columns]],
    normWeight: [normWeight, ['d']],
    normBias: [normBias, ['d']],
  })
  dtypes(op, { x, w, bias, normWeight, normBias })
  argument(op, !normWeight === !normBias, () => 'normWeight and normBias go together')
  const [u, v] = [Tensor.empty([T, heads, vDim], x), Tensor.empty([T, heads, vDim], x)]
  const [q, k] = [Tensor.empty([T, heads, qkDim], x), Tensor.empty([T, heads, qkDim], x)]
  const z = isTracked(x, w, bias, normWeight, normBias) ? Tensor.empty([T, columns], x) : null
  native.norm_linear_silu(u, v, q, k, z, x, w, bias, normWeight, normBias, eps, siluAll)
  record(op, [u, v, q, k], [x, w, bias, normWeight, normBias], (...dout) => {
    const [du, dv, dq, dk] = [u, v, q, k].map((out, i) => dout[i] ?? Tensor.zeros(out.shape, out))
    const [dx, dw] = [emptyLike(x), emptyLike(w)]
    const [dbias, dnormWeight, dnormBias] = [bias, normWeight, normBias].map(tensor => tensor && emptyLike(tensor))
    native.norm_linear_silu_backward(
      ...([dx, dw, dbias!, dnormWeight!, dnormBias!, du!, dv!, dq!, dk!] as const),
      ...([x, w, normWeight, normBias, z!, eps, siluAll] as const),
    )
    return [dx, dw, dbias!, dnormWeight!, dnormBias!]
  })
  return { u, v, q, k }
}
