import { availableParallelism } from 'node:os'

/** How long threads that wait for each other stay awake where there are processors to spare, ms: to be woken takes as long. */
export const AWAKE_MS = availableParallelism() > 2 ? 1 : 0

/** An event loop that turns without a pause while something is about to come; what else is due gets its turn as ever. */
export class Awake {
  #until = 0
  #turning = false

  /** @param waits whether there still is something to wait for */
  constructor(
    readonly waits: () => boolean,
    readonly ms = AWAKE_MS,
  ) {}

  /** From now on, for at most `ms`. */
  stay(): void {
    this.#until = performance.now() + this.ms
    if (this.#turning) return
    this.#turning = true
    setImmediate(this.#turn)
  }

  #turn = (): void => {
    this.#turning = performance.now() < this.#until && this.waits()
    if (this.#turning) setImmediate(this.#turn)
  }
}
