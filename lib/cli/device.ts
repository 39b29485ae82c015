import { HstuError, type HstuErrorCode } from '../errors.js'
import { native } from '../native.js'
import type { Device, TensorOptions } from '../tensor.js'

/**
 * Where a command computes. `auto` takes CUDA where it is usable, else the CPU (`hstu doctor` says why); an explicit `cuda` or
 * `cuda:1` never falls back.
 * @throws HstuError ERR_HSTU_CUDA_UNAVAILABLE, ERR_HSTU_DRIVER_TOO_OLD
 */
export function tensorOptions(device = 'auto'): TensorOptions {
  const { cuda } = native.backend()
  if (device !== 'auto' && device !== 'cpu' && !cuda.usable)
    throw new HstuError(cuda.code as HstuErrorCode, `device ${device}: ${cuda.reason}; use --device cpu`)
  if (device === 'cpu' || !cuda.usable) return { device: 'cpu' }
  return { device: device === 'auto' || device === 'cuda' ? 'cuda:0' : (device as Device) }
}
