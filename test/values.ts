// Inputs and values of op tests: what is drawn, how it is rounded and placed for a dtype and a device, how results are compared.
import { deepStrictEqual, ok } from 'node:assert/strict'
import { native } from '#lib/native.js'
import type { Random } from '#lib/random.js'
import { type Device, type Dtype, scope, Tensor } from '#lib/tensor.js'

/** An input of an op test: 'float' is cast to the dtype under test, 'wide' to float32 where that has 16 bits; others keep theirs. */
export type Values =
  | { shape: readonly number[]; data: Float64Array; kind: 'float' | 'wide' | 'float32' }
  | { shape: readonly number[]; data: BigInt64Array; kind: 'int64' }
  | { shape: readonly number[]; data: Int32Array; kind: 'int32' }

export type Inputs = Record<string, Values | null>
export type Tensors = Record<string, Tensor>
/** The inputs as plain arrays; integers as numbers. Absent ones are missing. */
export type Arrays = Record<string, Float64Array>

export function normal(random: Random, shape: readonly number[], scale = 1): Values {
  const data = new Float64Array(shape.reduce((a, b) => a * b, 1))
  for (let i = 0; i < data.length; i++) data[i] = scale * random.normal()
  return { shape, data, kind: 'float' }
}

export function int64(values: readonly (number | bigint)[], shape: readonly number[] = [values.length]): Values {
  return { shape, data: BigInt64Array.from(values.map(x => BigInt(x))), kind: 'int64' }
}

export function int32(values: readonly number[], shape: readonly number[] = [values.length]): Values {
  return { shape, data: Int32Array.from(values), kind: 'int32' }
}

/** seq_offsets of the given lengths. */
export function offsets(lengths: readonly number[]): Values {
  let total = 0
  return int64([0, ...lengths.map(length => (total += length))])
}

export function sum(values: readonly number[]): number {
  return values.reduce((a, b) => a + b, 0)
}

/** Relative Frobenius error of `actual` against `expected`; NaN and infinity must stand at the same places. */
export function relativeError(actual: ArrayLike<number | bigint>, expected: ArrayLike<number>): number {
  deepStrictEqual(actual.length, expected.length, 'number of elements')
  let difference = 0
  let norm = 0
  for (let i = 0; i < expected.length; i++) {
    const a = Number(actual[i])
    const e = expected[i]!
    if (!Number.isFinite(a) || !Number.isFinite(e)) {
      ok(Object.is(a, e), `element ${i}: got ${a}, expected ${e}`)
      continue
    }
    difference += (a - e) ** 2
    norm += e ** 2
  }
  return norm === 0 ? Math.sqrt(difference) : Math.sqrt(difference / norm)
}

export function assertClose(
  actual: ArrayLike<number | bigint>,
  expected: ArrayLike<number>,
  tolerance: number,
  what: string,
): void {
  const error = relativeError(actual, expected)
  ok(error <= tolerance, `${what}: relative error ${error.toExponential(2)} exceeds ${tolerance}`)
}

/** Rounds to the dtype's values (to nearest even), as the tensors of that dtype hold them. */
export function rounded(data: Float64Array, dtype: Dtype): Float64Array {
  if (dtype === 'float64') return data
  const single = Float32Array.from(data)
  if (dtype === 'float32') return Float64Array.from(single)
  return scope(() => decoded(castOnCpu(Tensor.from(single), dtype)))
}

/** Values of a float tensor of any dtype. */
export function decoded(tensor: Tensor): Float64Array {
  if (tensor.dtype === 'float32' || tensor.dtype === 'float64')
    return Float64Array.from(tensor.dataSync() as Float64Array)
  const bits = Tensor.from(tensor.dataSync(), tensor.shape, { dtype: tensor.dtype })
  return Float64Array.from(castOnCpu(bits, 'float32').dataSync() as Float32Array)
}

function castOnCpu(x: Tensor, dtype: Dtype): Tensor {
  const y = Tensor.empty(x.shape, { dtype })
  native.cast([y], [x])
  return y
}

/** A tensor of the dtype on the device. */
export function placed(data: Float64Array, shape: readonly number[], dtype: Dtype, device: Device): Tensor {
  if (dtype === 'float64') return Tensor.from(data, shape, { device })
  const single = Float32Array.from(data)
  if (dtype === 'float32') return Tensor.from(single, shape, { device })
  return Tensor.from(castOnCpu(Tensor.from(single, shape), dtype).dataSync(), shape, { dtype, device })
}

function dtypeOf(values: Values, dtype: Dtype): Dtype | null {
  if (values.kind === 'float') return dtype
  if (values.kind === 'wide') return dtype === 'float64' ? dtype : 'float32'
  return values.kind === 'float32' ? 'float32' : null
}

export function toTensors(inputs: Inputs, dtype: Dtype, device: Device = 'cpu'): Tensors {
  const tensors: Tensors = {}
  for (const [name, values] of Object.entries(inputs)) {
    if (!values) continue
    const as = dtypeOf(values, dtype)
    tensors[name] = as
      ? placed(values.data as Float64Array, values.shape, as, device)
      : Tensor.from(values.data, values.shape, { device })
  }
  return tensors
}

/** Inputs as the op sees them: rounded to what its dtype holds. */
export function toArrays(inputs: Inputs, dtype: Dtype): Arrays {
  const arrays: Arrays = {}
  for (const [name, values] of Object.entries(inputs)) {
    if (!values) continue
    const as = dtypeOf(values, dtype)
    arrays[name] = as
      ? rounded(values.data as Float64Array, as)
      : Float64Array.from(values.data as ArrayLike<bigint | number>, Number)
  }
  return arrays
}

export const isFloat = (tensor: Tensor) => tensor.dtype !== 'int32' && tensor.dtype !== 'int64'

export function roundedInputs(inputs: Inputs, dtype: Dtype): Inputs {
  const arrays = toArrays(inputs, dtype)
  const round = ([name, values]: [string, Values | null]): [string, Values | null] => {
    return [name, values && dtypeOf(values, dtype) ? ({ ...values, data: arrays[name]! } as Values) : values]
  }
  return Object.fromEntries(Object.entries(inputs).map(round))
}

/** Philox4x32-10 (Salmon et al., SC 2011) in BigInt: word `index` of a draw that begins at `offset`. For references. */
export function philoxWord(seed: bigint, offset: bigint, index: number): number {
  const mask = 0xffffffffn
  const counter = BigInt.asUintN(64, offset + BigInt(Math.floor(index / 4)))
  let c = [counter & mask, counter >> 32n, 0n, 0n] as [bigint, bigint, bigint, bigint]
  let k0 = BigInt.asUintN(64, seed) & mask
  let k1 = BigInt.asUintN(64, seed) >> 32n
  for (let round = 0; round < 10; round++) {
    const p0 = 0xd2511f53n * c[0]
    const p1 = 0xcd9e8d57n * c[2]
    c = [(p1 >> 32n) ^ c[1] ^ k0, p1 & mask, (p0 >> 32n) ^ c[3] ^ k1, p0 & mask]
    k0 = (k0 + 0x9e3779b9n) & mask
    k1 = (k1 + 0xbb67ae85n) & mask
  }
  return Number(c[index % 4]!)
}
