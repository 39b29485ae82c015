import type { Draws } from '../philox.js'
import type { Tensor } from '../tensor.js'

/** Jagged sequences of tokens on the device: what a layer must know of them. B sequences, T tokens. */
export interface TokenInputs {
  /** int64 [B + 1] */
  seqOffsets: Tensor
  /** int64 [T] seconds; null where the data has no times. */
  times: Tensor | null
  /** int64 [T] seconds: when the prediction of each row is made (retrieval: the time of the next action). */
  queryTimes: Tensor | null
  /** Longest sequence of the batch. */
  maxSeqLen: number
  /** int32 [B]: how many of a sequence's last tokens are targets, which see the history and themselves. Without it none are. */
  numTargets?: Tensor | null
  /** Contextual tokens at the start of each sequence; default 0. */
  contextual?: number
}

/** A jagged batch on the device: what a sequence model reads. */
export interface SequenceInputs extends TokenInputs {
  /** int64 [T], 1 .. numItems */
  ids: Tensor
}

/** Where the dropouts of a training pass draw from; null in inference: no dropout. */
export type Noise = Draws | null
