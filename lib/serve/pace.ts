/** How long a token takes, smoothed over what was computed, with what it takes between two batches where one follows another. */
export class Pace {
  /** 0 until something was measured. */
  msPerToken = 0
  #tokens = 0
  /** Since when they were computed. */
  #from = 0
  /** When the last batch was measured; Infinity: nothing waited when it ended. */
  #last = Infinity

  begin(now: number): void {
    this.#tokens = 0
    this.#from = Math.min(now, this.#last)
  }

  /** So many tokens of the batch are done. */
  settle(tokens: number): true {
    this.#tokens += tokens
    return true
  }

  measure(now: number): void {
    if (this.#tokens === 0) return
    const measured = (now - this.#from) / this.#tokens
    this.#tokens = 0
    this.#from = now
    this.msPerToken = this.msPerToken === 0 ? measured : 0.8 * this.msPerToken + 0.2 * measured
  }

  /** @param waits whether something waits for the next batch */
  end(waits: boolean): void {
    this.#last = waits ? this.#from : Infinity
  }

  /** For a request that was stopped by what was measured and might have been in time: lest that stops all of them. */
  giveWay(): void {
    this.msPerToken *= 0.98
  }
}
