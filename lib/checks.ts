import { HstuError } from './errors.js'
import { shapeText, type Tensor } from './tensor.js'

/**
 * Checks an op's tensors against shapes written in letters and binds the letters, e.g.
 * `shapes('linear', { x: [x, ['T', 'in']], w: [w, ['in', 'out']], bias: [bias, ['out']] })` returns `{ T, in, out }`.
 * A number is an exact dim, `'...'` (first) any leading dims; null or undefined tensors are skipped.
 * @throws HstuError ERR_HSTU_SHAPE naming the op, the argument and both shapes.
 */
export function shapes<L extends string>(
  op: string,
  tensors: Record<string, readonly [Tensor | null | undefined, readonly (L | number | '...')[]]>,
): Record<L, number> {
  const bound: Record<string, number> = {}
  const from: Record<string, string> = {}
  for (const name in tensors) {
    const [tensor, dims] = tensors[name]!
    if (!tensor) continue
    const any = dims[0] === '...'
    const wanted = any ? dims.slice(1) : dims
    const text = () =>
      `[${dims.map(dim => (typeof dim === 'string' && dim in bound ? `${dim}=${bound[dim]}` : dim)).join(', ')}]`
    if (any ? tensor.rank < wanted.length : tensor.rank !== wanted.length)
      throw new HstuError('ERR_HSTU_SHAPE', `${op}: ${name} must have shape ${text()}, got ${shapeText(tensor)}`)
    const start = tensor.rank - wanted.length
    wanted.forEach((letter, i) => {
      const dim = tensor.shape[start + i]!
      if (typeof letter === 'number' ? letter === dim : !(letter in bound) || bound[letter] === dim) {
        if (typeof letter === 'string' && !(letter in bound)) {
          bound[letter] = dim
          from[letter] = name
        }
        return
      }
      const why = typeof letter === 'string' ? ` (${letter}=${bound[letter]} from ${from[letter]})` : ''
      throw new HstuError('ERR_HSTU_SHAPE', `${op}: ${name} must have shape ${text()}, got ${shapeText(tensor)}${why}`)
    })
  }
  return bound as Record<L, number>
}

/** Checks that all tensors share one of the float dtypes (float32, float64, bfloat16, float16), or have exactly `dtype`. */
export function dtypes(op: string, tensors: Record<string, Tensor | null | undefined>, dtype?: Tensor['dtype']): void {
  let first: [string, Tensor] | undefined
  for (const name in tensors) {
    const tensor = tensors[name]
    if (!tensor) continue
    if (dtype && tensor.dtype !== dtype)
      throw new HstuError('ERR_HSTU_DTYPE', `${op}: ${name} must be ${dtype}, got ${shapeText(tensor)}`)
    if (!dtype && (tensor.dtype === 'int32' || tensor.dtype === 'int64'))
      throw new HstuError('ERR_HSTU_DTYPE', `${op}: ${name} must have a float dtype, got ${shapeText(tensor)}`)
    first ??= [name, tensor]
    if (tensor.dtype !== first[1].dtype)
      throw new HstuError('ERR_HSTU_DTYPE', `${op}: ${name} is ${tensor.dtype}, ${first[0]} is ${first[1].dtype}`)
  }
}

/** Whether a tensor is there and has the shape and dtype of another: what is asked before the checks that know what to say. */
export function isLike(tensor: Tensor | null | undefined, other: Tensor): boolean {
  if (!tensor || tensor.dtype !== other.dtype || tensor.shape.length !== other.shape.length) return false
  for (let i = 0; i < other.shape.length; i++) if (tensor.shape[i] !== other.shape[i]) return false
  return true
}

/** Checks a scalar argument. */
export function argument(op: string, condition: boolean, message: () => string): void {
  if (!condition) throw new HstuError('ERR_HSTU_INVALID_ARGUMENT', `${op}: ${message()}`)
}
