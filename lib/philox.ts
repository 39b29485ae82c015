import type { Tensor } from './tensor.js'

/** Where a draw of random words begins: the key and the counter of Philox4x32-10. */
export interface PhiloxPosition {
  seed: bigint
  offset: bigint
  /** int64 [1], added to the offset when the device comes to the draw: a step that is captured once draws anew at each replay. */
  base?: Tensor | null
}

/** What ops that draw get their positions from. */
export interface Draws {
  /** The position of a draw of `count` 32-bit words. */
  draw(count: number): PhiloxPosition
}

/**
 * Hands out disjoint ranges of one Philox stream (Salmon et al., SC 2011) to the ops that draw inside their kernels: dropout masks,
 * negatives. An op regenerates its draw in the backward from the same position, and a run resumes from `offset`.
 */
export class Philox implements Draws {
  constructor(
    readonly seed: bigint,
    public offset = 0n,
  ) {}

  /** The next draw begins behind this one (four words a counter step). */
  draw(count: number): PhiloxPosition {
    const position = { seed: this.seed, offset: this.offset }
    this.offset += BigInt(Math.ceil(count / 4))
    return position
  }
}
