import { deepStrictEqual, ok } from 'node:assert/strict'
import { record, valueAndGrad } from '#lib/autograd.js'
import { native } from '#lib/native.js'
import { Random } from '#lib/random.js'
import { type Device, type Dtype, memory, scope, Tensor } from '#lib/tensor.js'
import {
  type Arrays,
  assertClose,
  decoded,
  type Inputs,
  isFloat,
  normal,
  placed,
  rounded,
  roundedInputs,
  type Tensors,
  toArrays,
  toTensors,
} from './values.js'

export * from './values.js'

export interface OpTest<C> {
  /** Each case is one row of the table; `name` labels it. Edge cases belong here: B = 0, empty sequences, tile +-1. */
  cases: readonly (C & { name: string })[]
  inputs: (c: C, random: Random) => Inputs
  /** Calls the op. Several outputs are compared one by one. */
  run: (t: Tensors, c: C) => Tensor | readonly Tensor[]
  /** The formula of the spec in plain loops, written without a look at the kernels: each output, flat. */
  reference: (x: Arrays, c: C) => ArrayLike<number>[]
  /** Names of the inputs that have a gradient. */
  gradients?: readonly string[]
  /** Relative Frobenius error allowed (default float32 1e-5, float64 1e-11; gradients ten times that). 0 = equal bits. */
  tolerance?: Partial<Record<'float32' | 'float64', number>>
  /** Dtypes under test on the CPU; default float32 and float64. */
  dtypes?: readonly ('float32' | 'float64')[]
  /** Dtypes under test on CUDA; default float32, bfloat16 and float16. */
  cudaDtypes?: readonly ('float32' | 'bfloat16' | 'float16')[]
}

const list = (out: Tensor | readonly Tensor[]): readonly Tensor[] => (out instanceof Tensor ? [out] : out)

/** Scalar sum of outputs times fixed cotangents, recorded so that the gradients of the outputs are those cotangents. */
function project(outputs: readonly Tensor[], cotangents: readonly Float64Array[]): Tensor {
  let total = 0
  outputs.forEach((output, i) => {
    if (!isFloat(output)) return
    const data = decoded(output)
    for (let j = 0; j < data.length; j++) total += data[j]! * cotangents[i]![j]!
  })
  const { dtype, device } = outputs.find(isFloat)!
  const value = placed(Float64Array.of(total), [1], dtype === 'float64' ? dtype : 'float32', device)
  return record('project', value, outputs, () =>
    outputs.map((output, i) => {
      if (!isFloat(output)) return null
      return placed(cotangents[i]!, output.shape, output.dtype, output.device)
    }),
  )
}

const kSamples = 24 // elements of each input whose finite difference is taken
const kStep = 1e-5

function gradientsOf<C>(
  test: OpTest<C>,
  c: C,
  inputs: Inputs,
  dtype: Dtype,
  cotangents: Float64Array[],
  device: Device = 'cpu',
): Float64Array[] {
  return scope(() => {
    const tensors = toTensors(inputs, dtype, device)
    const names = test.gradients!.filter(name => tensors[name])
    const { grads } = valueAndGrad(
      names.map(name => tensors[name]!),
      () => project(list(test.run(tensors, c)), cotangents),
    )
    return (grads as readonly Tensor[]).map(decoded)
  })
}

function checkFiniteDifferences<C>(
  test: OpTest<C>,
  c: C,
  inputs: Inputs,
  random: Random,
  cotangents: Float64Array[],
): void {
  const names = test.gradients!.filter(name => inputs[name])
  const gradients = gradientsOf(test, c, inputs, 'float64', cotangents)
  names.forEach((name, n) => {
    const values = inputs[name]!
    const gradient = gradients[n]!
    let norm = 0
    for (const g of gradient) norm = Math.max(norm, Math.abs(g))
    const count = Math.min(kSamples, gradient.length)
    for (let s = 0; s < count; s++) {
      const i = count === gradient.length ? s : random.int(gradient.length)
      const data = values.data as Float64Array
      const x = data[i]!
      const at = (value: number) => {
        data[i] = value
        return scope(() => project(list(test.run(toTensors(inputs, 'float64'), c)), cotangents).item())
      }
      const numeric = (at(x + kStep) - at(x - kStep)) / (2 * kStep)
      data[i] = x
      const error = Math.abs(numeric - gradient[i]!)
      ok(error <= 1e-6 * Math.max(1, norm), `d${name}[${i}] is ${gradient[i]}, finite difference ${numeric}`)
    }
  })
}

function checkCase<C>(test: OpTest<C>, c: C & { name: string }, seed: number): void {
  const before = memory()
  const violations = native.guard_violations()
  native.set_guards(true)
  try {
    const inputs = test.inputs(c, new Random(seed))
    let shapes: number[] = []
    for (const dtype of test.dtypes ?? (['float32', 'float64'] as const)) {
      const tolerance = test.tolerance?.[dtype] ?? (dtype === 'float32' ? 1e-5 : 1e-11)
      scope(() => {
        const outputs = list(test.run(toTensors(inputs, dtype), c))
        const expected = test.reference(toArrays(inputs, dtype), c)
        deepStrictEqual(outputs.length, expected.length, 'number of outputs')
        outputs.forEach((output, i) => {
          assertClose(output.dataSync(), expected[i]!, tolerance, `${dtype} output ${i}`)
        })
        shapes = outputs.map(output => output.size)
      })
    }
    if (test.gradients) {
      const random = new Random(seed + 1)
      const cotangents = shapes.map(size => Float64Array.from({ length: size }, () => random.normal()))
      checkFiniteDifferences(test, c, inputs, random, cotangents)
      const exact = gradientsOf(test, c, inputs, 'float64', cotangents)
      const single = gradientsOf(test, c, inputs, 'float32', cotangents)
      const tolerance = 10 * (test.tolerance?.float32 ?? 1e-5)
      single.forEach((gradient, i) => {
        assertClose(gradient, exact[i]!, tolerance, `float32 gradient ${test.gradients![i]}`)
      })
    }
  } finally {
    native.set_guards(false)
  }
  deepStrictEqual(native.guard_violations(), violations, 'guard bytes around an output were overwritten')
  deepStrictEqual(memory(), before, 'memory() before and after')
}

/**
 * Error allowed on CUDA, relative Frobenius. float32 as on the CPU; the 16-bit types hold inputs and outputs with 8 and 11 bits, so a
 * right kernel, which sums in float32 and rounds once, stays near 2^-9 and 2^-12 an operation that rounds.
 */
const cudaTolerance = { float32: 1e-5, bfloat16: 6e-3, float16: 1e-3 }

/** CUDA against the reference, and its gradients against the CPU's in float64 on the same rounded inputs. */
function checkCudaCase<C>(test: OpTest<C>, c: C & { name: string }, seed: number): void {
  const before = memory()
  const violations = native.guard_violations()
  native.set_guards(true)
  try {
    const inputs = test.inputs(c, new Random(seed))
    for (const dtype of test.cudaDtypes ?? (['float32', 'bfloat16', 'float16'] as const)) {
      const tolerance = Math.max(cudaTolerance[dtype], test.tolerance?.float32 ?? 0)
      const sizes = scope(() => {
        const outputs = list(test.run(toTensors(inputs, dtype, 'cuda:0'), c))
        const expected = test.reference(toArrays(inputs, dtype), c)
        outputs.forEach((output, i) => {
          assertClose(
            isFloat(output) ? decoded(output) : output.dataSync(),
            expected[i]!,
            tolerance,
            `cuda ${dtype} output ${i}`,
          )
        })
        return outputs.map(output => output.size)
      })
      if (!test.gradients) continue
      const random = new Random(seed + 1)
      const cotangents = sizes.map(size =>
        rounded(
          Float64Array.from({ length: size }, () => random.normal()),
          dtype,
        ),
      )
      const same = roundedInputs(inputs, dtype)
      const exact = gradientsOf(test, c, same, 'float64', cotangents)
      const actual = gradientsOf(test, c, inputs, dtype, cotangents, 'cuda:0')
      const again = gradientsOf(test, c, inputs, dtype, cotangents, 'cuda:0')
      actual.forEach((gradient, i) => {
        const name = test.gradients![i]
        assertClose(
          gradient,
          exact[i]!,
          dtype === 'float32' ? 10 * tolerance : 3 * tolerance,
          `cuda ${dtype} gradient ${name}`,
        )
        deepStrictEqual(again[i], gradient, `cuda ${dtype} gradient ${name}: two runs`)
      })
    }
  } finally {
    native.set_guards(false)
  }
  deepStrictEqual(native.guard_violations(), violations, 'guard bytes around an output were overwritten')
  deepStrictEqual(memory(), before, 'memory() before and after')
}

/** One check outside the test runner. */
export interface Check {
  op: string
  name: string
  device: 'cpu' | 'cuda'
  run: () => void | Promise<void>
  /** Of a check that takes minutes, in the test runner. */
  timeoutMs?: number | undefined
}

/** What describeOp and itOp registered, for `hstu selftest`. */
export const checks: Check[] = []

type Row = Omit<Check, 'op'>
interface Runner {
  describe?: (name: string, body: () => void) => void
  it?: ((name: string, body: () => unknown, timeoutMs?: number) => void) & {
    skip: (name: string, body: () => unknown) => void
  }
}

function register(op: string, rows: Row[]): void {
  const { describe, it } = globalThis as Runner
  if (!describe || !it) return void checks.push(...rows.map(row => ({ op, ...row })))
  const { usable, reason } = native.backend().cuda
  describe(op, () => {
    for (const row of rows) if (row.device === 'cpu' || usable) it(`${row.device} ${row.name}`, row.run, row.timeoutMs)
    const waiting = rows.filter(row => row.device === 'cuda').length
    if (waiting > 0 && !usable) it.skip(`cuda: ${waiting} cases NOT RUN (${reason})`, () => {})
  })
}

/**
 * Tests an op from one table: each case on the CPU in float32 and float64 against the reference, its gradients against float64 finite
 * differences and float32 against float64; on CUDA in float32, bfloat16 and float16 against the reference and the CPU's gradients, twice
 * for equal bits; guard bytes around every tensor made, outputs pre-filled with NaN, and `memory()` unchanged. Runs under the test
 * runner, or as rows of `hstu selftest`.
 */
export function describeOp<C>(op: string, test: OpTest<C>): void {
  const row = (device: Row['device'], check: typeof checkCase<C>) => (c: C & { name: string }, i: number) => ({
    ...{ name: c.name, device, run: () => check(test, c, 1000 + i) },
  })
  register(op, [...test.cases.map(row('cpu', checkCase)), ...test.cases.map(row('cuda', checkCudaCase))])
}

/** Further checks of an op (errors, invariances) that its table cannot say; also run by `hstu selftest`. */
export function itOp(
  op: string,
  name: string,
  run: () => void | Promise<void>,
  device: 'cpu' | 'cuda' = 'cpu',
  timeoutMs?: number,
): void {
  register(op, [{ name, device, run, timeoutMs }])
}

/** Asserts that `fn` throws an HstuError with this code and a message that matches. */
export function throwsCode(fn: () => unknown, code: string, message: RegExp): void {
  const before = memory()
  try {
    scope(fn)
  } catch (error) {
    deepStrictEqual((error as { code?: string }).code, code)
    ok(message.test((error as Error).message), `message '${(error as Error).message}' does not match ${message}`)
    deepStrictEqual(memory(), before, 'memory() after an error')
    return
  }
  throw new Error(`expected ${code}`)
}

/** A copy of the values of a float tensor, for comparisons in checks. */
export function valuesOf(tensor: Tensor): Float64Array {
  return Float64Array.from(tensor.dataSync() as Float64Array)
}

/**
 * Asserts on CUDA that rows of `run` have the same bits whatever the number of rows. `run` gets x [n, width[0]],
 * w [width[0], width[1]] and a maker of further inputs [n, columns], of which a shorter call has the last rows of a longer one.
 */
export function sameRows(
  dtype: 'float32' | 'bfloat16' | 'float16',
  counts: readonly number[],
  width: readonly [number, number],
  run: (rows: (columns: number, seed: number) => Tensor, x: Tensor, w: Tensor) => Tensor,
): void {
  const most = Math.max(...counts)
  const before = memory()
  const outputs = counts.map(n =>
    scope(() => {
      const rows = (columns: number, seed: number) => {
        const all = normal(new Random(seed), [most, columns]).data as Float64Array
        return placed(all.slice((most - n) * columns), [n, columns], dtype, 'cuda:0')
      }
      const w = placed(normal(new Random(2), width, 0.1).data as Float64Array, width, dtype, 'cuda:0')
      return decoded(run(rows, rows(width[0], 1), w))
    }),
  )
  const longest = outputs[counts.indexOf(most)]!
  outputs.forEach((output, i) => {
    deepStrictEqual(output, longest.slice(longest.length - output.length), `the last ${counts[i]} of ${most} rows`)
  })
  deepStrictEqual(memory(), before, 'memory() before and after')
}

/** Asserts that `run` gives the same bits with 1, 2 and 3 threads and when run again, and frees what it made. */
export function sameBits(run: () => Tensor | readonly Tensor[]): void {
  const bytes = (threads: number) => {
    native.set_num_threads(threads)
    return scope(() => list(run()).map(tensor => Buffer.from(tensor.dataSync().buffer)))
  }
  const before = memory()
  try {
    const first = bytes(1)
    for (const threads of [1, 2, 3])
      for (const [i, other] of bytes(threads).entries())
        ok(first[i]!.equals(other), `output ${i} with ${threads} threads differs from the first run`)
  } finally {
    native.set_num_threads(0)
  }
  deepStrictEqual(memory(), before, 'memory() before and after')
}
