import { argument } from '../checks.js'
import { native } from '../native.js'
import { type Device, Tensor } from '../tensor.js'

export interface RandomIdsOptions {
  /** Smallest id. */
  low: number | bigint
  /** One more than the largest id; `high - low` is at least 1 and below 2^32. */
  high: number | bigint
  /** Key of the generator. */
  seed: bigint
  /** Block of the generator's stream at which the draw begins; n elements use ceil(n / 4) blocks. Default 0. */
  offset?: bigint
  device?: Device
}

/**
 * Independent ids, uniform in low .. high - 1, the same on every device. Element n (row-major) is
 * `low + floor(w (high - low) / 2^32)`, w = word n mod 4 of block `offset + floor(n / 4)` of Philox4x32-10 keyed by `seed` (Salmon et
 * al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011); the bias is below (high - low) / 2^32.
 * @returns int64 of the given shape
 * @throws HstuError ERR_HSTU_INVALID_ARGUMENT for an impossible range.
 */
export function randomIds(shape: readonly number[], options: RandomIdsOptions): Tensor {
  const { low, high, seed, offset = 0n, device = 'cpu' } = options
  for (const [name, id] of Object.entries({ low, high }))
    argument(
      'random_ids',
      typeof id === 'bigint' || Number.isSafeInteger(id),
      () => `${name} must be an integer, got ${id}`,
    )
  const range = BigInt(high) - BigInt(low)
  argument('random_ids', range >= 1n && range < 1n << 32n, () => {
    return `high - low must be at least 1 and below 2^32, got ${high} - ${low}`
  })
  const ids = Tensor.empty(shape, { dtype: 'int64', device })
  native.random_ids(ids, BigInt(low), BigInt(high), seed, offset)
  return ids
}
