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
  for (const name in tensors) {
    const [tensor, dims] = tensors[name]!
    if (!tensor) continue
    const skipped = dims[0] === '...' ? 1 : 0
    const start = tensor.shape.length - (dims.length - skipped)
    let wrong = skipped ? start < 0 : start !== 0
    let letter: L | number | '...' = '...'
    for (let i = skipped; i < dims.length && !wrong; i++) {
      letter = dims[i]!
      const dim = tensor.shape[start + i - skipped]!
      wrong = (typeof letter === 'number' ? letter : (bound[letter as string] ??= dim)) !== dim
    }
    if (!wrong) continue
    const text = dims.map(dim => (typeof dim === 'string' && dim in bound ? `${dim}=${bound[dim]}` : dim)).join(', ')
    const from = Object.keys(tensors).find(other => tensors[other]![0] && tensors[other]![1].includes(letter))
    const why = letter in bound ? ` (${letter}=${bound[letter as string]} from ${from})` : ''
    throw new HstuError('ERR_HSTU_SHAPE', `${op}: ${name} must have shape [${text}], got ${shapeText(tensor)}${why}`)
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
