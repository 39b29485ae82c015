import type { Random } from '../random.js'
import { Tensor, type TensorOptions, unscoped } from '../tensor.js'

function fill(shape: readonly number[], options: TensorOptions, sample: () => number): Tensor {
  const size = shape.reduce((a, b) => a * b, 1)
  const data = options.dtype === 'float64' ? new Float64Array(size) : new Float32Array(size)
  for (let i = 0; i < size; i++) data[i] = sample()
  return unscoped(() => Tensor.from(data, shape, options))
}

/** N(0, std^2). Parameters are made outside every scope. */
export function normal(random: Random, shape: readonly number[], std: number, options: TensorOptions): Tensor {
  return fill(shape, options, () => std * random.normal())
}

/** N(0, std^2) cut at two standard deviations, by rejection. */
export function truncatedNormal(random: Random, shape: readonly number[], std: number, options: TensorOptions): Tensor {
  return fill(shape, options, () => {
    for (;;) {
      const x = random.normal()
      if (Math.abs(x) <= 2) return std * x
    }
  })
}

/** Uniform in -bound .. bound. */
export function uniform(random: Random, shape: readonly number[], bound: number, options: TensorOptions): Tensor {
  return fill(shape, options, () => bound * (2 * random.float() - 1))
}

/** Uniform with variance 2 / (fan in + fan out) (Glorot and Bengio 2010); shape [in, out]. */
export function xavierUniform(random: Random, shape: readonly [number, number], options: TensorOptions): Tensor {
  return uniform(random, shape, Math.sqrt(6 / (shape[0] + shape[1])), options)
}

/** Normal with variance 2 / (fan in + fan out); shape [in, out]. */
export function xavierNormal(random: Random, shape: readonly [number, number], options: TensorOptions): Tensor {
  return normal(random, shape, Math.sqrt(2 / (shape[0] + shape[1])), options)
}

export function zeros(shape: readonly number[], options: TensorOptions): Tensor {
  return unscoped(() => Tensor.zeros(shape, options))
}

export function ones(shape: readonly number[], options: TensorOptions): Tensor {
  return fill(shape, options, () => 1)
}
