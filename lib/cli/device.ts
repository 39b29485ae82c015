import { HstuError } from '../errors.js'
import { native } from '../native.js'
import type { TensorOptions } from '../tensor.js'

/**
 * Where a command computes. `auto` takes CUDA where this build has it, else the CPU; an explicit `cuda` never falls back.
 * @throws HstuError ERR_HSTU_CUDA_UNAVAILABLE
 */
export function tensorOptions(device = 'auto'): TensorOptions {
  const { cuda } = native.backend()
  if (device === 'cuda' && !cuda)
    throw new HstuError('ERR_HSTU_CUDA_UNAVAILABLE', 'device cuda: this build has no CUDA backend; use --device cpu')
  return device !== 'cpu' && cuda ? { device: 'cuda:0' } : {}
}
