import { check, HstuError } from './errors.js'
import { native } from './native.js'
import { emptyLike, scope, setDisposeHandler, shapeText, Tensor } from './tensor.js'

/** Gradient of each output (null where nothing flowed into it) to gradient of each input (null where it has none). */
export type Backward = (...dout: (Tensor | null)[]) => (Tensor | null)[]

interface Node {
  name: string
  outputs: readonly Tensor[]
  inputs: readonly (Tensor | null)[]
  backward: Backward
}

let tape: Node[] | null = null
/** Tensors whose gradient is wanted, directly or through what was computed from them. */
let tracked: Set<Tensor> | null = null
/** Gradients that are views of others. */
const views = new WeakSet<Tensor>()

/** Whether a gradient with respect to any of `inputs` is wanted: an op saves what only its backward needs when it is. */
export function isTracked(...inputs: (Tensor | null | undefined)[]): boolean {
  return tracked !== null && inputs.some(input => input != null && tracked!.has(input))
}

/**
 * Puts an op on the tape, if one is open and a gradient is wanted through any input.
 * `backward` gets the outputs' gradients in order and returns the inputs' gradients in order.
 */
export function record<R extends Tensor | readonly Tensor[]>(
  name: string,
  outputs: R,
  inputs: readonly (Tensor | null | undefined)[],
  backward: Backward,
): R {
  if (tape && isTracked(...inputs)) {
    const list: readonly Tensor[] = outputs instanceof Tensor ? [outputs] : outputs
    tape.push({ name, outputs: list, inputs: inputs.map(input => input ?? null), backward })
    for (const output of list) tracked!.add(output)
  }
  return outputs
}

/** Whether a tape is open. */
export function isRecording(): boolean {
  return tape !== null
}

/** A gradient that was summed in float32, in its input's dtype. */
export function inDtypeOf(input: Tensor, gradient: Tensor): Tensor {
  if (input.dtype === gradient.dtype) return gradient
  const rounded = emptyLike(input)
  native.cast([rounded], [gradient])
  return rounded
}

/** Throws when a tape is recording: for ops that change tensors in place. */
export function refuseInTape(name: string): void {
  check(
    tape === null,
    'ERR_HSTU_INVALID_ARGUMENT',
    () => `${name} changes tensors in place: call it outside valueAndGrad`,
  )
}

function checkGradient(node: Node, index: number, gradient: Tensor): void {
  const input = node.inputs[index]!
  const same =
    gradient.dtype === input.dtype &&
    gradient.device === input.device &&
    gradient.shape.length === input.shape.length &&
    gradient.shape.every((dim, i) => dim === input.shape[i])
  check(same, 'ERR_HSTU_SHAPE', () => {
    return `${node.name}: gradient ${index} is ${shapeText(gradient)}, its input is ${shapeText(input)}`
  })
}

/** 1, made on the device: a graph that is captured takes nothing from the host. */
function oneLike(value: Tensor): Tensor {
  const offsets = Tensor.zeros([2], { dtype: 'int64', device: value.device })
  const one = emptyLike(value)
  native.jagged_to_dense(one.view([1, 1]), Tensor.empty([0], value), offsets, 1) // an empty sequence, padded with 1
  return one
}

/** Walks the tape backwards from `value`, whose gradient is one. */
function backpropagate(nodes: Node[], value: Tensor): Map<Tensor, Tensor> {
  const gradients = new Map<Tensor, Tensor>([[value, oneLike(value)]])
  for (let n = nodes.length - 1; n >= 0; n--) {
    const node = nodes[n]!
    const dout = node.outputs.map(output => gradients.get(output) ?? null)
    if (dout.every(gradient => gradient === null)) continue
    const din = node.backward(...dout)
    for (let i = 0; i < node.inputs.length; i++) {
      const [input, gradient] = [node.inputs[i], din[i]]
      if (!input || !gradient || !tracked!.has(input)) continue
      checkGradient(node, i, gradient)
      const before = gradients.get(input)
      if (before) {
        const sum = emptyLike(before)
        native.add(sum, before, gradient)
        gradients.set(input, sum)
      } else gradients.set(input, gradient)
    }
  }
  return gradients
}

/**
 * Runs `fn` on a tape and returns its value with the gradient of that value with respect to each of `params`.
 *
 * `fn` returns a scalar tensor (one element, float32 or float64). Nothing is recorded outside this call; everything that `fn` made
 * is freed when it returns, but for the value and the gradients. A parameter that `fn` did not use gets zeros.
 * @throws HstuError ERR_HSTU_SHAPE when `fn`'s value is no scalar, or a backward returned a gradient of another shape.
 */
export function valueAndGrad<P extends readonly Tensor[] | Record<string, Tensor>>(
  params: P,
  fn: () => Tensor,
): { value: Tensor; grads: { [K in keyof P]: Tensor } } {
  if (tape) throw new HstuError('ERR_HSTU_INVALID_ARGUMENT', 'valueAndGrad cannot be nested')
  const list: Tensor[] = Array.isArray(params) ? [...params] : Object.values(params)
  const later: Tensor[] = [] // some perhaps twice, which dispose allows
  const handler = setDisposeHandler(tensor => later.push(tensor))
  try {
    return scope(() => {
      tape = []
      tracked = new Set(list)
      const value = fn()
      const nodes = tape
      tape = null // what the backwards compute is not recorded
      check(value instanceof Tensor && value.size === 1, 'ERR_HSTU_SHAPE', () => {
        return `valueAndGrad: the function must return a scalar, got ${value instanceof Tensor ? shapeText(value) : typeof value}`
      })
      const gradients = backpropagate(nodes, value)
      // Ops hand one gradient to several inputs, or a view of it; what leaves here is changed in place (clipping), so each is its own.
      const given = new Set<Tensor>()
      const of = (param: Tensor) => {
        let gradient = gradients.get(param) ?? Tensor.zeros(param.shape, param)
        if (given.has(gradient) || views.has(gradient))
          native.cast([(gradient = emptyLike(param))], [gradients.get(param)!])
        given.add(gradient)
        return gradient
      }
      const grads = Array.isArray(params)
        ? list.map(of)
        : Object.fromEntries(Object.entries(params).map(([key, param]) => [key, of(param)]))
      return { value, grads: grads as { [K in keyof P]: Tensor } }
    })
  } finally {
    tape = null
    tracked = null
    setDisposeHandler(handler)
    for (const tensor of later) tensor.dispose()
  }
}

/** Same values, other shape of the same size; the gradient flows through. Shares the storage. */
export function reshape(x: Tensor, shape: readonly number[]): Tensor {
  check(shape.reduce((a, b) => a * b, 1) === x.size, 'ERR_HSTU_SHAPE', () => {
    return `reshape: ${shapeText(x)} does not fill [${shape.join(', ')}]`
  })
  return record('reshape', x.view(shape), [x], dy => {
    const dx = dy!.view(x.shape)
    views.add(dx)
    return [dx]
  })
}
