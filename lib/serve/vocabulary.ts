import { check } from '../errors.js'
import { type TextIds, textIds } from './ids.js'

/** An external id: text, or a whole number that stands for its decimal digits. Numbers beyond 2^53 as bigint or text. */
export type Id = string | number | bigint

function hash(units: Uint16Array, begin: number, end: number): number {
  let h = 0x811c9dc5
  for (let i = begin; i < end; i++) h = Math.imul(h ^ units[i]!, 0x01000193)
  h = Math.imul(h ^ (h >>> 15), 0x85ebca6b)
  return h ^ (h >>> 13)
}

/**
 * External ids and their numbers: id k of the list is number k + 1; 0 is unknown. A hash table with open addresses over the ids' code units:
 * a request's ids are looked up where they lie, without a string an id.
 */
export class Vocabulary {
  readonly #units: Uint16Array
  readonly #ends: Int32Array
  /** Kept, lest reading ahead is left out as of no use. */
  protected ahead = 0
  /** Number (0: none) and hash of each slot, side by side. */
  readonly #table: Int32Array

  /** @throws HstuError ERR_HSTU_CHECKPOINT for an id that is no text, or is there twice. */
  constructor(
    readonly name: string,
    readonly ids: readonly string[],
  ) {
    const wrong = (k: number) => `vocabulary '${name}', entry ${k}: ${JSON.stringify(ids[k])} is no new text`
    const texts = textIds(ids)
    check(texts, 'ERR_HSTU_CHECKPOINT', () => wrong(ids.findIndex(id => typeof id !== 'string')))
    const { units, ends } = texts
    this.#units = units
    this.#ends = ends
    const slots = 2 ** Math.ceil(Math.log2(2 * ids.length + 2))
    this.#table = new Int32Array(2 * slots)
    for (let k = 0, begin = 0; k < ids.length; begin = ends[k++]!) {
      const h = hash(units, begin, ends[k]!)
      const at = this.#find(h, units, begin, ends[k]!)
      check(this.#table[at] === 0, 'ERR_HSTU_CHECKPOINT', () => wrong(k))
      this.#table[at] = k + 1
      this.#table[at + 1] = h
    }
  }

  get size(): number {
    return this.ids.length
  }

  /** Where the id is, or would be. @param h its hash */
  #find(h: number, units: Uint16Array, begin: number, end: number): number {
    const table = this.#table
    const last = table.length - 1
    let at = (2 * h) & last
    for (; table[at]! > 0; at = (at + 2) & last)
      if (table[at + 1] === h && this.#is(table[at]!, units, begin, end)) break
    return at
  }

  #is(number: number, units: Uint16Array, begin: number, end: number): boolean {
    const first = number === 1 ? 0 : this.#ends[number - 2]!
    if (this.#ends[number - 1]! - first !== end - begin) return false
    for (let i = begin, k = first; i < end; i++, k++) if (units[i] !== this.#units[k]) return false
    return true
  }

  /** 0 where the id is unknown. */
  numberOf(id: string | bigint): number {
    return this.numbersOf(textIds([String(id)])!)[0]!
  }

  /** The same of each id from `first` on. */
  numbersOf({ units, ends }: TextIds, first = 0): Int32Array {
    const table = this.#table
    const last = table.length - 1
    const [numbers, hashes] = [new Int32Array(ends.length - first), new Int32Array(ends.length - first)]
    let begin = first === 0 ? 0 : ends[first - 1]!
    for (let i = 0; i < numbers.length; begin = ends[first + i++]!) hashes[i] = hash(units, begin, ends[first + i]!)
    // What a lookup reads lies anywhere: read for all ids first, so that the processor waits for memory once and not three times an id.
    for (let i = 0; i < numbers.length; i++) numbers[i] = table[(2 * hashes[i]!) & last]!
    for (let i = 0; i < numbers.length; i++) numbers[i] = numbers[i]! < 2 ? 0 : this.#ends[numbers[i]! - 2]!
    let read = 0
    for (let i = 0; i < numbers.length; i++) read ^= this.#units[numbers[i]!]!
    this.ahead = read
    begin = first === 0 ? 0 : ends[first - 1]!
    for (let i = 0; i < numbers.length; begin = ends[first + i++]!)
      numbers[i] = table[this.#find(hashes[i]!, units, begin, ends[first + i]!)]!
    return numbers
  }
}
