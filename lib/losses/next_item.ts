import { computeDtype, type Precision } from '../layers/precision.js'
import { cast } from '../ops/cast.js'
import { sampledSoftmaxLoss } from '../ops/sampled_softmax_loss.js'
import { softmaxLoss } from '../ops/softmax_loss.js'
import type { Draws } from '../philox.js'
import { Tensor } from '../tensor.js'

export interface NextItemLossOptions {
  /**
   * What a target is set against: 'uniform' items drawn a position (default), the other targets of the batch ('in-batch'), or
   * every item ('full').
   */
  negatives?: 'uniform' | 'in-batch' | 'full'
  /** R, of 'uniform'. Default 128. */
  numNegatives?: number
  /** Divides the scores. Default 0.05. */
  temperature?: number
  /** What the scores of 'full' are computed in; default 'float32'. With few items a position bfloat16 gains nothing, and is not used. */
  precision?: Precision
}

/**
 * Mean over supervised positions of -log softmax of the next item's score, scores being <output, item / |item|> / temperature
 * (Zhai et al. 2024, public recipe).
 * @param output [T, d] L2-normalised
 * @param items [numItems + 1, d] the item table as trained; row 0 is padding
 * @param targets int64 [T]; rows of weight 0 may hold 0
 * @param weights [T], 1 where a position is supervised
 * @param philox where uniform negatives draw from
 * @param negativeIds int64 [R]: {@link inBatchNegatives} of the targets, for 'in-batch'; without it they are read back from the device
 */
export function nextItemLoss(
  output: Tensor,
  items: Tensor,
  targets: Tensor,
  weights: Tensor,
  philox: Draws,
  options: NextItemLossOptions = {},
  negativeIds: Tensor | null = null,
): Tensor {
  const { negatives = 'uniform', numNegatives = 128, temperature = 0.05, precision = 'float32' } = options
  if (negatives === 'full') {
    const dtype = computeDtype(precision, output)
    return softmaxLoss(cast(output, dtype), cast(items, dtype), targets, { weights, temperature })
  }
  if (negatives === 'uniform') {
    const position = philox.draw(targets.size * numNegatives)
    return sampledSoftmaxLoss(output, items, targets, { weights, numNegatives, temperature, ...position })
  }
  const shared =
    negativeIds ??
    Tensor.from(inBatchNegatives(targets.dataSync() as BigInt64Array), undefined, { device: targets.device })
  return sampledSoftmaxLoss(output, items, targets, { weights, negativeIds: shared, temperature })
}

/** The distinct targets of a batch, in the order in which they occur, without padding: what each is set against by 'in-batch'. */
export function inBatchNegatives(targets: BigInt64Array): BigInt64Array {
  const distinct = new Set(targets)
  distinct.delete(0n)
  return BigInt64Array.from(distinct)
}
