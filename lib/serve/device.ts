import { HstuError, type HstuErrorCode } from '../errors.js'
import { native } from '../native.js'
import type { Device } from '../tensor.js'

/**
 * Where to compute: 'auto' takes CUDA where it is usable, else the CPU; an explicit 'cuda' or 'cuda:1' never falls back.
 * @param instead what an error advises
 * @throws HstuError ERR_HSTU_CUDA_UNAVAILABLE, ERR_HSTU_DRIVER_TOO_OLD
 */
export function chooseDevice(device = 'auto', instead = "device: 'cpu'"): Device {
  const { cuda } = native.backend()
  if (device !== 'auto' && device !== 'cpu' && !cuda.usable)
    throw new HstuError(cuda.code as HstuErrorCode, `device ${device}: ${cuda.reason}; use ${instead}`)
  if (device === 'cpu' || !cuda.usable) return 'cpu'
  return device === 'auto' || device === 'cuda' ? 'cuda:0' : (device as Device)
}
