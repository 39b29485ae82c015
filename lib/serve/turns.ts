/** What is handed on in a turn of the event loop. */
const A_TURN = 16

/**
 * Hands on what comes a few at a time: a port hands over a thousand messages before timers get their turn, and what is done with each takes
 * time. The first that come in a turn of the event loop are handed on at once, the others in the next ones.
 */
export class Turns<T> {
  readonly #left: T[] = []
  #turn: NodeJS.Immediate | null = null

  constructor(readonly handOn: (one: T) => void) {}

  add(...all: T[]): void {
    this.#left.push(...all)
    if (!this.#turn) this.handOnAll(A_TURN)
    this.#soon()
  }

  /** @param most at once */
  handOnAll(most = Infinity): void {
    for (const one of this.#left.splice(0, most)) this.handOn(one)
  }

  #soon(): void {
    this.#turn ??= setImmediate(() => {
      this.#turn = null
      this.handOnAll(A_TURN)
      if (this.#left.length > 0) this.#soon()
    })
  }
}
