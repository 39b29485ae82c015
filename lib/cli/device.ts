import { chooseDevice } from '../serve/device.js'
import type { TensorOptions } from '../tensor.js'

/**
 * Where a command computes (`hstu doctor` says why `auto` takes the CPU).
 * @throws HstuError ERR_HSTU_CUDA_UNAVAILABLE, ERR_HSTU_DRIVER_TOO_OLD
 */
export function tensorOptions(device?: string): TensorOptions {
  return { device: chooseDevice(device, '--device cpu') }
}
