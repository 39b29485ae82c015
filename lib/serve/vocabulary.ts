import { check } from '../errors.js'

/** An external id: text, or a whole number that stands for its decimal digits. Numbers beyond 2^53 as bigint or text. */
export type Id = string | number | bigint

/** External ids and their numbers: id k of the list is number k + 1; 0 is unknown. */
export class Vocabulary {
  readonly #numbers = new Map<string, number>()
  /** Ids that are the digits of a safe integer, so that numbers need not become text; made at the first one looked up. */
  #integers: Map<number, number> | null = null

  /** @throws HstuError ERR_HSTU_CHECKPOINT for an id that is no text, or is there twice. */
  constructor(
    readonly name: string,
    readonly ids: readonly string[],
  ) {
    ids.forEach((id, k) => {
      const fresh = typeof id === 'string' && !this.#numbers.has(id)
      check(
        fresh,
        'ERR_HSTU_CHECKPOINT',
        () => `vocabulary '${name}', entry ${k}: ${JSON.stringify(id)} is no new text`,
      )
      this.#numbers.set(id, k + 1)
    })
  }

  get size(): number {
    return this.ids.length
  }

  /** 0 where the id is unknown. */
  numberOf(id: string | bigint): number {
    if (typeof id === 'string') return this.#numbers.get(id) ?? 0
    const small = Number(id)
    if (!Number.isSafeInteger(small)) return this.#numbers.get(String(id)) ?? 0
    this.#integers ??= new Map(
      [...this.#numbers].filter(([text]) => /^(0|-?[1-9]\d{0,15})$/.test(text)).map(([text, n]) => [Number(text), n]),
    )
    return this.#integers.get(small) ?? 0
  }
}
