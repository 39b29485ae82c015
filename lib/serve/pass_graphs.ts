import { captureGraph, type Graph } from '../graph.js'
import { type Device, scope, Tensor, unscoped } from '../tensor.js'
import type { PassShape, PassValues } from './pass.js'

interface Captured {
  words: Tensor
  numbers: Tensor
  graph: Graph<Tensor>
  tokens: number
}

/** Tokens of all graphs that are kept: each token is the memory of a few rows of every kind. */
const MOST_TOKENS = 1 << 16

/** CUDA graphs of passes by their shapes, least recently used ones given up. */
export class PassGraphs {
  readonly #graphs = new Map<string, Captured>()
  #tokens = 0

  constructor(readonly device: Device) {}

  get size(): number {
    return this.#graphs.size
  }

  /**
   * What `compute` makes of the values; captured where the shape is new.
   * @returns values until the next pass of this shape
   */
  run(
    shape: PassShape,
    { words, used, numbers }: PassValues,
    compute: (words: Tensor, numbers: Tensor) => Tensor,
  ): Tensor {
    const key = Object.values(shape).join()
    const found = this.#graphs.get(key)
    if (found) {
      this.#graphs.delete(key)
      this.#graphs.set(key, found)
      scope(() => found.words.rows(0, used).write(words.subarray(0, used)))
      found.numbers.write(numbers)
      return found.graph.replay()
    }
    this.#makeRoom(shape.tokens)
    const { device } = this
    const onDevice = unscoped(() => Tensor.from(words, undefined, { device }))
    let narrow: Tensor | null = null
    try {
      narrow = unscoped(() => Tensor.from(numbers, undefined, { device }))
      const given = narrow
      const graph = captureGraph(() => compute(onDevice, given), { device })
      this.#graphs.set(key, { words: onDevice, numbers: given, graph, tokens: shape.tokens })
      this.#tokens += shape.tokens
      return graph.outputs
    } catch (error) {
      onDevice.dispose()
      narrow?.dispose()
      throw error
    }
  }

  #makeRoom(tokens: number): void {
    for (const [key, captured] of this.#graphs) {
      if (this.#tokens + tokens <= MOST_TOKENS) return
      this.#graphs.delete(key)
      this.#tokens -= captured.tokens
      free(captured)
    }
  }

  dispose(): void {
    for (const captured of this.#graphs.values()) free(captured)
    this.#graphs.clear()
    this.#tokens = 0
  }
}

function free({ words, numbers, graph }: Captured): void {
  graph.dispose()
  words.dispose()
  numbers.dispose()
}
