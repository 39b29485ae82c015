import { check } from '../errors.js'
import type { Dtype, TensorOptions } from '../tensor.js'

export const precisions = ['float32', 'bf16'] as const

/**
 * What a model computes in: 'float32' (as its parameters are), or 'bf16' on CUDA: bfloat16 inside its layers, with float32 parameters,
 * embeddings, output and sums.
 */
export type Precision = (typeof precisions)[number]

/**
 * The dtype of the tensors inside the layers, for parameters of `dtype` on `device`.
 * @throws HstuError ERR_HSTU_INVALID_ARGUMENT for 'bf16' on the CPU.
 */
export function computeDtype(precision: Precision, { dtype = 'float32', device = 'cpu' }: TensorOptions): Dtype {
  if (precision === 'float32') return dtype
  check(device !== 'cpu', 'ERR_HSTU_INVALID_ARGUMENT', () => {
    return `precision '${precision}' computes on CUDA alone, the device here is 'cpu': use device 'cuda', or precision 'float32'`
  })
  return 'bfloat16'
}
