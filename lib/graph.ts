import { isRecording } from './autograd.js'
import { check } from './errors.js'
import { native } from './native.js'
import { type Device, keptBy, scope, shapeText, type Tensor, tensorsIn, unscoped } from './tensor.js'

export interface GraphOptions {
  /** Whose work is captured. Default 'cpu', where nothing is: the function runs each time. */
  device?: Device
}

/** What `captureGraph` takes beside. */
export interface CaptureOptions extends GraphOptions {
  /** Another graph of the device, whose memory this one uses too: for graphs of one function at several shapes, say. */
  pool?: Graph<unknown> | undefined
}

// Under HSTU_DEBUG=1 every op is waited for and checked, which a capture cannot be.
const runsEagerly = (device: Device) => device === 'cpu' || process.env.HSTU_DEBUG === '1'

/** What the addon wraps with a CUDA graph. */
class NativeGraph {
  constructor(device: Device, pool?: NativeGraph) {
    native.graph_create(this, device === 'cuda' ? 'cuda:0' : device, pool)
  }

  capture<R>(fn: () => R, keep: boolean): R {
    return native.graph_capture(this, fn, keep)
  }

  launch(): void {
    native.graph_launch(this)
  }

  dispose(): void {
    native.graph_dispose(this)
  }
}

function refuseInTape(name: string): void {
  check(!isRecording(), 'ERR_HSTU_INVALID_ARGUMENT', () => {
    return `${name} inside valueAndGrad: capture a function that calls valueAndGrad instead`
  })
}

/** Writes the values of one result into the tensors of another. */
function copyInto(outputs: readonly Tensor[], values: readonly Tensor[]): void {
  check(outputs.length === values.length, 'ERR_HSTU_SHAPE', () => {
    return `captureGraph: the function returned ${outputs.length} tensors, then ${values.length}`
  })
  outputs.forEach((output, i) => {
    const value = values[i]!
    if (value === output) return
    check(shapeText(output) === shapeText(value), 'ERR_HSTU_SHAPE', () => {
      return `captureGraph: output ${i} was ${shapeText(output)}, then ${shapeText(value)}: a graph has fixed shapes`
    })
    native.cast([output], [value])
  })
}

/** What the addon knows graphs by. */
const natives = new WeakMap<Graph<unknown>, NativeGraph>()

/** The work of a function, recorded once and launched as a whole. */
export interface Graph<R> {
  /** What the function returned. Each replay writes new values into the same tensors; they are freed with the graph. */
  readonly outputs: R
  /** Puts the work on the device's stream again and returns `outputs`. */
  replay(): R
  /** Frees the graph, its memory and its outputs. May be called again. */
  dispose(): void
}

/**
 * Captures what `fn` does on a CUDA device, so that replaying it costs one launch however many ops it has.
 *
 * Shapes, scalars (seeds, learning rates) and the tensors that `fn` uses are fixed: write new values into the same input tensors
 * before a replay. The graph keeps the tensors that it uses, and memory for those made inside: its own, or that of the graph `pool`, where a
 * replay of one graph may overwrite the outputs of another: read them, or enqueue what reads them, first. `fn` is run twice by the
 * capture, of which the second run computes nothing, so that `outputs` have values at once and what `fn` changes in place is changed
 * once; each replay changes it again. On the CPU, and under HSTU_DEBUG=1, nothing is captured: each replay runs `fn` and copies what
 * it returned into `outputs`.
 *
 *     const graph = captureGraph(() => model.forward(inputs), { device: 'cuda' })
 *     inputs.ids.write(next)
 *     const y = graph.replay().dataSync()
 *
 * @throws HstuError ERR_HSTU_INVALID_ARGUMENT where `fn` reads a tensor (`item()`, `dataSync()`, `data()`), writes one, captures a
 * graph itself or returns a promise, and inside `valueAndGrad`; ERR_HSTU_DEVICE where it runs an op on another device;
 * ERR_HSTU_SHAPE where its results change shape.
 */
export function captureGraph<R>(fn: () => R, { device = 'cpu', pool }: CaptureOptions = {}): Graph<R> {
  refuseInTape('captureGraph')
  if (runsEagerly(device)) {
    const { result, kept } = unscoped(() => keptBy(fn))
    const outputs = tensorsIn(result)
    const replay = () => {
      scope(() => copyInto(outputs, tensorsIn(fn())))
      return result
    }
    return { outputs: result, replay, dispose: () => kept.forEach(tensor => void tensor.dispose()) }
  }
  const graph = new NativeGraph(device, pool && natives.get(pool))
  try {
    const { result, kept } = unscoped(() =>
      scope(() => {
        const first = tensorsIn(fn())
        const captured = graph.capture(() => keptBy(fn), true)
        copyInto(tensorsIn(captured.result), first)
        return captured
      }),
    )
    const replay = () => {
      graph.launch()
      return result
    }
    const dispose = () => {
      graph.dispose()
      for (const tensor of kept) tensor.dispose()
    }
    const made: Graph<R> = { outputs: result, replay, dispose }
    natives.set(made, graph)
    return made
  } catch (error) {
    graph.dispose()
    throw error
  }
}

/** A function whose work on the device is launched as one graph. */
export interface Graphed<A extends unknown[], R> {
  (...args: A): R
  /** Frees the graph and its memory; results live on. May be called again. */
  dispose(): void
}

/**
 * `fn`, launching all its work on a CUDA device at once: every call runs `fn` to record its launches, updates the executable graph
 * with them in place (where the ops are other ones than before, it is made anew), and launches it. So scalars may differ from call to
 * call, as seeds and learning rates of a training step do, and results are new tensors as those of `fn` are. The first call runs `fn`
 * as it is. On the CPU, and under HSTU_DEBUG=1, every call does.
 *
 *     const step = graphed((lr: number) => {
 *       const { value, grads } = valueAndGrad(parameters, () => loss(batch))
 *       optimizer.step(grads, lr)
 *       return value
 *     }, { device: 'cuda' })
 *     batch.ids.write(ids)              // the host's part is done outside
 *     const loss = step(1e-3).item()
 *
 * @throws HstuError when called, as `captureGraph`
 */
export function graphed<A extends unknown[], R>(
  fn: (...args: A) => R,
  { device = 'cpu' }: GraphOptions = {},
): Graphed<A, R> {
  let graph: NativeGraph | null = null
  const call = (...args: A): R => {
    refuseInTape('graphed')
    if (runsEagerly(device)) return scope(() => fn(...args))
    if (!graph) {
      graph = new NativeGraph(device)
      return scope(() => fn(...args))
    }
    const captured = graph
    return scope(() => {
      const result = captured.capture(() => scope(() => fn(...args)), false)
      captured.launch()
      return result
    })
  }
  return Object.assign(call, {
    dispose: () => {
      graph?.dispose()
      graph = null
    },
  })
}
