import { check } from '../errors.js'
import { native } from '../native.js'
import { idCount, textIds, type WireIds } from './ids.js'

/** An external id: text, or a whole number that stands for its decimal digits. Numbers beyond 2^53 as bigint or text. */
export type Id = string | number | bigint

/**
 * External ids and their numbers: id k of the list is number k + 1; 0 is unknown. A native hash table over the ids' code units: a request's
 * ids are looked up where they lie, without a string an id.
 */
export class Vocabulary {
  /** @throws HstuError ERR_HSTU_CHECKPOINT for an id that is no text, or is there twice. */
  constructor(
    readonly name: string,
    readonly ids: readonly string[],
  ) {
    const texts = textIds(ids)
    const wrong = texts
      ? native.vocabulary_create(this, texts.units, texts.ends)
      : ids.findIndex(id => typeof id !== 'string')
    check(wrong < 0, 'ERR_HSTU_CHECKPOINT', () => {
      return `vocabulary '${name}', entry ${wrong}: ${JSON.stringify(ids[wrong])} is no new text`
    })
  }

  get size(): number {
    return this.ids.length
  }

  /** 0 where the id is unknown. */
  numberOf(id: string | bigint): number {
    return this.numbersOf(textIds([String(id)])!)[0]!
  }

  /** The same of each id from `first` on. */
  numbersOf(ids: WireIds, first = 0): Int32Array {
    const numbers = new Int32Array(idCount(ids) - first)
    if ('ends' in ids) native.vocabulary_texts(this, ids.units, ids.ends, first, numbers)
    else native.vocabulary_digits(this, ids.subarray(first), numbers)
    return numbers
  }
}
