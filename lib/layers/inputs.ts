import type { Philox } from '../philox.js'
import type { Tensor } from '../tensor.js'

/** A jagged batch on the device: what a sequence model reads. B users, T tokens. */
export interface SequenceInputs {
  /** int64 [T], 1 .. numItems */
  ids: Tensor
  /** int64 [B + 1] */
  seqOffsets: Tensor
  /** int64 [T] seconds; null where the data has no times. */
  times: Tensor | null
  /** int64 [T] seconds: when the prediction of each row is made (retrieval: the time of the next action). */
  queryTimes: Tensor | null
  /** Longest sequence of the batch. */
  maxSeqLen: number
}

/** Where the dropouts of a training pass draw from; null in inference: no dropout. */
export type Noise = Philox | null
