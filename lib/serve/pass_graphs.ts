import { captureGraph, type Graph } from '../graph.js'
import { type Device, Tensor, unscoped } from '../tensor.js'
import type { PassShape, PassValues } from './pass.js'

interface Captured {
  words: Tensor
  numbers: Tensor
  graph: Graph<Tensor>
  tokens: number
  /** Views of the first words, by how many: to make one takes longer than to write what lies in it. */
  heads: Map<number, Tensor>
}

/** Words by which heads differ. */
const HEAD_WORDS = 1024

/** A view of the first words of a graph's array, of `used` or a few more. */
function headOf({ words, heads }: Captured, used: number): Tensor {
  const length = Math.min(words.size, HEAD_WORDS * Math.ceil(used / HEAD_WORDS))
  let head = heads.get(length)
  if (!head) {
    head = unscoped(() => words.rows(0, length))
    heads.set(length, head)
  }
  return head
}

/** Tokens of all graphs that are kept: each token is the memory of a few rows of every kind. */
const MOST_TOKENS = 1 << 16

const MOST_SEEN = 1024

/** CUDA graphs of passes by their shapes, least recently used ones given up. */
export class PassGraphs {
  readonly #graphs = new Map<string, Captured>()
  #tokens = 0

  /** How often shapes came that are not captured. */
  readonly #seen = new Map<string, number>()

  /** @param sightings how often a shape comes until it is captured: a capture takes as long as several passes */
  constructor(
    readonly device: Device,
    readonly sightings = 2,
  ) {}

  get size(): number {
    return this.#graphs.size
  }

  /**
   * What `compute` makes of the values.
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
      const head = headOf(found, used)
      head.write(words.subarray(0, head.size))
      found.numbers.write(numbers)
      return found.graph.replay()
    }
    const { device } = this
    if (!this.#isCommon(key))
      return compute(Tensor.from(words, undefined, { device }), Tensor.from(numbers, undefined, { device }))
    this.#makeRoom(shape.tokens)
    const onDevice = unscoped(() => Tensor.from(words, undefined, { device }))
    let narrow: Tensor | null = null
    try {
      narrow = unscoped(() => Tensor.from(numbers, undefined, { device }))
      const given = narrow
      const graph = captureGraph(() => compute(onDevice, given), { device })
      this.#graphs.set(key, { words: onDevice, numbers: given, graph, tokens: shape.tokens, heads: new Map() })
      this.#tokens += shape.tokens
      return graph.outputs
    } catch (error) {
      onDevice.dispose()
      narrow?.dispose()
      throw error
    }
  }

  #isCommon(key: string): boolean {
    const seen = (this.#seen.get(key) ?? 0) + 1
    this.#seen.delete(key)
    if (seen >= this.sightings) return true
    this.#seen.set(key, seen)
    if (this.#seen.size > MOST_SEEN) this.#seen.delete(this.#seen.keys().next().value!)
    return false
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

function free({ words, numbers, graph, heads }: Captured): void {
  graph.dispose()
  for (const head of heads.values()) head.dispose()
  words.dispose()
  numbers.dispose()
}
