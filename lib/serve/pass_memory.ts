import { Words } from './words.js'

/** Sizes of a pass. Passes of one shape differ in nothing but the values of two arrays. */
export interface PassShape {
  /** N, tokens, and R of them, the rows of the last layer; M candidates. */
  tokens: number
  asked: number
  candidates: number
  /** B */
  sequences: number
  /** Of all sequences; 0: none has any in pages. */
  keys: number
  /** Entries of the page table. */
  pages: number
  /** Rows of content and of actions that are made in the pass; 0 with tables. */
  contentRows: number
  actionRows: number
  /** Keys of the longest sequence, at most. */
  longest: number
  /** Whether histories come with the candidates, and whether any of them is written to pages. */
  first: boolean
  writes: boolean
}

/** The int64 arrays of a pass, one after the other; keys' times last, for no pass fills its bucket's. */
export function wordFields(shape: PassShape, positions: boolean) {
  const { tokens: N, asked: R, candidates: M, sequences: B, keys } = shape
  // One literal: made for every pass, and many times slower of parts.
  return {
    seqOffsets: B + 1,
    askedOffsets: B + 1,
    groups: B + 1,
    pageOffsets: B + 1,
    timeOffsets: keys && B + 1,
    states: B,
    askedRows: R,
    askedTimes: R,
    predicted: M,
    positions: positions ? N : 0,
    content: N,
    contentFrom: shape.contentRows,
    actions: N,
    actionsFrom: shape.actionRows,
    queryTimes: N,
    keyTimes: keys,
  }
}

export const numberFields = ({ sequences: B, pages }: PassShape) => ({ numTargets: B, kvLengths: B, counts: B, pageTable: pages }) // biome-ignore format: one line

/** The place of each field, and how long all of them are. */
export function places<N extends string>(fields: Record<N, number>): { of: Record<N, [number, number]>; size: number } {
  let size = 0
  const of = {} as Record<N, [number, number]>
  for (const name in fields) of[name] = [size, (size += fields[name])]
  return { of, size }
}

/** The values of a pass: what is copied to the device. `used`: words before those that nobody reads. */
export interface PassValues {
  words: BigInt64Array
  used: number
  numbers: Int32Array
}

type WordField = keyof ReturnType<typeof wordFields>
type NumberField = keyof ReturnType<typeof numberFields>

/** The two arrays of a pass, and each field of them. */
interface PassArrays {
  words: BigInt64Array
  numbers: Int32Array
  of: Record<WordField, BigInt64Array>
  views: Record<WordField, Words>
  counts: Record<NumberField, Int32Array>
}

/** Shapes whose fields are kept. */
const MOST_SHAPES = 64

/** Host memory for the arrays of passes: what it gave counts until it is asked again. */
export class PassMemory {
  #words = new BigInt64Array(0)
  #numbers = new Int32Array(0)
  /** To make them takes as long as to fill them. */
  readonly #shapes = new Map<string, PassArrays>()

  /** Zeros, but for the keys' times. */
  take(shape: PassShape, positions: boolean): PassArrays {
    const key = `${Object.values(shape).join()},${positions}`
    const arrays = this.#shapes.get(key) ?? this.#make(key, shape, positions)
    arrays.words.fill(0n, 0, arrays.words.length - arrays.of.keyTimes.length)
    arrays.numbers.fill(0)
    return arrays
  }

  #make(key: string, shape: PassShape, positions: boolean): PassArrays {
    const [wide, narrow] = [places(wordFields(shape, positions)), places(numberFields(shape))]
    if (wide.size > this.#words.length || narrow.size > this.#numbers.length) {
      this.#shapes.clear()
      this.#words = new BigInt64Array(Math.max(this.#words.length, 2 * wide.size))
      this.#numbers = new Int32Array(Math.max(this.#numbers.length, 2 * narrow.size))
    }
    if (this.#shapes.size === MOST_SHAPES) this.#shapes.clear()
    const words = this.#words.subarray(0, wide.size)
    const numbers = this.#numbers.subarray(0, narrow.size)
    const of = {} as PassArrays['of']
    const views = {} as PassArrays['views']
    const counts = {} as PassArrays['counts']
    for (const name in wide.of) {
      of[name as WordField] = words.subarray(...wide.of[name as WordField])
      views[name as WordField] = new Words(of[name as WordField])
    }
    for (const name in narrow.of) counts[name as NumberField] = numbers.subarray(...narrow.of[name as NumberField])
    const made = { words, numbers, of, views, counts }
    this.#shapes.set(key, made)
    return made
  }
}
