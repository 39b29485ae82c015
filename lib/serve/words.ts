import { wordsOf } from '../data/words.js'

/** An int64 array that is filled by its 32-bit words: a bigint an element costs more than all else that is done with it. */
export class Words {
  readonly values: BigInt64Array
  readonly #words: Int32Array

  constructor(values: number | BigInt64Array) {
    this.values = typeof values === 'number' ? new BigInt64Array(values) : values
    this.#words = wordsOf(this.values)
  }

  static of(values: BigInt64Array): Words {
    return new Words(values)
  }

  /** Element i from its words; hosts of this package are little-endian. */
  put(i: number, low: number, high: number): void {
    this.#words[2 * i] = low
    this.#words[2 * i + 1] = high
  }

  /** Element i as a number, exact where it is a safe integer. */
  number(i: number): number {
    return 2 ** 32 * this.#words[2 * i + 1]! + (this.#words[2 * i]! >>> 0)
  }

  /** Element i becomes a safe integer. */
  putNumber(i: number, value: number): void {
    this.put(i, value | 0, Math.floor(value / 2 ** 32))
  }

  /** Element i from element j of another array. */
  copy(i: number, from: Words, j: number): void {
    this.#words[2 * i] = from.#words[2 * j]!
    this.#words[2 * i + 1] = from.#words[2 * j + 1]!
  }

  /** How many elements are not negative. */
  there(): number {
    let count = 0
    for (let i = 1; i < this.#words.length; i += 2) count += Number(this.#words[i]! >= 0)
    return count
  }

  /** Elements i .. i + count - 1 become first, first + 1, .., all of them 0 .. 2^31 - 1. */
  count(i: number, first: number, count: number): void {
    for (let k = 0; k < count; k++) this.#words[2 * (i + k)] = first + k
  }
}

/** Arrays one after the other. */
export function joined(arrays: readonly BigInt64Array[]): BigInt64Array {
  if (arrays.length === 1) return arrays[0]!
  const all = new BigInt64Array(arrays.reduce((sum, array) => sum + array.length, 0))
  let at = 0
  for (const array of arrays) {
    all.set(array, at)
    at += array.length
  }
  return all
}
