import { execFileSync } from 'node:child_process'
import { mkdirSync, writeFileSync } from 'node:fs'
import { cpus } from 'node:os'
import { join } from 'node:path'
import Benchmark from 'benchmark'
import { record, valueAndGrad } from '#lib/autograd.js'
import { native, packageRoot } from '#lib/native.js'
import { Random } from '#lib/random.js'
import { type Device, emptyLike, scope, Tensor } from '#lib/tensor.js'
import { placed, type Values } from '../test/harness.js'

type Scalar = number | string | boolean | undefined

export interface OpBench<C extends Record<string, Scalar>> {
  /** `case` labels the row; the other keys are shape letters and options, copied into the result. */
  cases: readonly (C & { case: string })[]
  inputs: (c: C, random: Random) => Record<string, Values | null>
  run: (t: Record<string, Tensor>, c: C) => Tensor | readonly Tensor[]
  /** Inputs whose gradient is timed: the row then holds [forward, backward]. */
  gradients?: readonly string[]
  /** Floating-point operations of the forward; the row is in GFLOP/s. */
  flops?: (c: C) => number
  /** Default: twice the forward's. */
  backwardFlops?: (c: C) => number
  /** Bytes the forward moves; the row is in GB/s where no flops are given. */
  bytes?: (c: C) => number
}

/** One case of a result file: its keys are `case`, shape letters, dtype, unit, ms, hstu, ceiling. */
export interface Row {
  [key: string]: Scalar | number[] | Record<string, number>
}

/** A file of bench/results. */
export interface Result {
  device: string
  threads?: number
  instructionSet?: string
  driver?: number
  cuda?: number
  node: string
  commit: string
  date: string
  command: string
  ceiling: { gflops: number; gbps: number }
  rows: Row[]
}

type FloatDtype = 'float32' | 'bfloat16'

const registered: { op: string; run: (ceiling: Result['ceiling'], dtype: FloatDtype) => Row[] }[] = []

/** Where the benches of this run compute. */
let device: Device = 'cpu'

/** Seconds a call takes on CUDA: enough calls to fill 50 ms between two waits for the device, the median of seven such runs. */
function deviceSeconds(fn: () => void): number {
  const wait = Tensor.zeros([1], { device })
  const run = (count: number) => {
    wait.dataSync()
    const start = performance.now()
    for (let i = 0; i < count; i++) fn()
    wait.dataSync()
    return (performance.now() - start) / 1e3
  }
  run(3)
  const count = Math.max(1, Math.ceil(0.05 / run(1)))
  const samples = Array.from({ length: 7 }, () => run(count) / count).sort((a, b) => a - b)
  wait.dispose()
  return samples[3]!
}

/** Seconds a call takes: the median of Benchmark's samples. */
function seconds(name: string, fn: () => void): number {
  if (device !== 'cpu') return deviceSeconds(fn)
  const bench = new Benchmark(name, fn, { minSamples: 5, maxTime: 1 })
  bench.run()
  if (bench.error) throw bench.error
  const samples = [...bench.stats.sample].sort((a, b) => a - b)
  return samples[samples.length >> 1]!
}

function toTensors(inputs: Record<string, Values | null>, dtype: FloatDtype): Record<string, Tensor> {
  const tensors: Record<string, Tensor> = {}
  for (const [name, values] of Object.entries(inputs)) {
    if (!values) continue
    const { kind, shape, data } = values
    if (kind === 'int32' || kind === 'int64') tensors[name] = Tensor.from(data, shape, { device })
    else tensors[name] = placed(data, shape, kind === 'float' ? dtype : 'float32', device)
  }
  return tensors
}

/** A scalar whose gradient reaches every output as ones, at no cost to speak of. */
export function headOf(outputs: readonly Tensor[], ones: readonly Tensor[]): Tensor {
  return record('head', Tensor.zeros([1], { device }), outputs, () => [...ones])
}

/** Registers an op's bench: the same inputs as its tests, at realistic sizes, float32. */
export function benchOp<C extends Record<string, Scalar>>(op: string, bench: OpBench<C>): void {
  registered.push({
    op,
    run: (ceiling, dtype) =>
      bench.cases.map(c =>
        scope(() => {
          const tensors = toTensors(bench.inputs(c, new Random(1)), dtype)
          const outputs = (() => {
            const out = bench.run(tensors, c)
            return out instanceof Tensor ? [out] : out
          })()
          const work = bench.flops?.(c) ?? bench.bytes?.(c) ?? 0
          const unit = bench.flops ? 'GFLOP/s' : 'GB/s'
          const forward = seconds(`${op} ${c.case}`, () => scope(() => void bench.run(tensors, c)))
          const row: Row = { ...c, dtype, unit, ms: round(forward * 1e3), hstu: round(work / forward / 1e9) }
          if (bench.gradients) {
            const ones = outputs.map(output => {
              const float = output.dtype === 'float32' || output.dtype === 'bfloat16'
              return float
                ? placed(new Float64Array(output.size).fill(1), output.shape, output.dtype as FloatDtype, device)
                : emptyLike(output)
            })
            const params = bench.gradients.filter(name => tensors[name]).map(name => tensors[name]!)
            const both = seconds(`${op} ${c.case} backward`, () => {
              scope(() => {
                valueAndGrad(params, () => {
                  const out = bench.run(tensors, c)
                  return headOf(out instanceof Tensor ? [out] : out, ones)
                })
              })
            })
            const backward = Math.max(both - forward, 1e-9)
            const backwardWork = bench.backwardFlops?.(c) ?? 2 * work
            row.ms = [round(forward * 1e3), round(backward * 1e3)]
            row.hstu = [round(work / forward / 1e9), round(backwardWork / backward / 1e9)]
          }
          row.ceiling = bench.flops ? round(ceiling.gflops) : round(ceiling.gbps)
          return row
        }),
      ),
  })
}

/** Cases whose model, or optimiser state, is float32 alone. */
const float32Only = new Set(['adamw', 'training_step'])

/** Registers something larger than an op (a training step): `run` returns its rows. */
export function benchCase(name: string, run: (ceiling: Result['ceiling'], dtype: FloatDtype) => Row[]): void {
  registered.push({ op: name, run })
}

export const timed = seconds

/** Where this run computes, for cases that make their own tensors. */
export const benchDevice = () => device

export function round(x: number): number {
  return Number(x.toPrecision(4))
}

function print(op: string, rows: Row[]): void {
  for (const row of rows) {
    const { case: name, dtype, unit, ms, hstu, ceiling, ...shape } = row
    const letters = Object.entries(shape).map(([key, value]) => `${key} ${value}`)
    const pair = (value: unknown) => (Array.isArray(value) ? value.join(' | ') : String(value ?? ''))
    const share = typeof ceiling === 'number' ? ` of ${ceiling}` : ''
    process.stdout.write(
      `${op.padEnd(28)} ${String(name).padEnd(18)} ${letters.join(', ').padEnd(44)} ${pair(ms).padStart(18)} ms ` +
        `${pair(hstu).padStart(18)}${share} ${unit ?? ''} ${dtype ?? ''}\n`,
    )
  }
}

function commit(): string {
  if (process.env.HSTU_COMMIT) return process.env.HSTU_COMMIT
  const git = (...args: string[]) => execFileSync('git', args, { cwd: packageRoot, encoding: 'utf8' }).trim()
  try {
    return git('rev-parse', 'HEAD') + (git('status', '--porcelain', '--', 'csrc', 'lib') ? '-dirty' : '')
  } catch {
    return 'unknown'
  }
}

/** Copy of 1 GiB (read plus write) by `cast`, and the product of 8192^3 in bfloat16 by `linear`: what the others are measured against. */
function cudaCeilings(): Result['ceiling'] {
  return scope(() => {
    const x = Tensor.zeros([2 ** 28], { device })
    const copy = seconds('copy', () => scope(() => void native.cast([emptyLike(x)], [x])))
    const n = 8192
    const values = Float64Array.from({ length: n }, (_, i) => Math.sin(i))
    const a = placed(
      Float64Array.from({ length: n * n }, (_, i) => values[(i * 31) % n]!),
      [n, n],
      'bfloat16',
      device,
    )
    const product = seconds('product', () =>
      scope(() => void native.linear(emptyLike(a), null, a, a, null, null, 'none')),
    )
    return { gflops: (2 * n ** 3) / product / 1e9, gbps: (2 * 2 ** 30) / copy / 1e9 }
  })
}

/** Runs what was registered whose name is one of `filters` (all where there are none) and saves the results where `save` is set. */
export function runBenches(
  filters: readonly string[],
  options: { save: boolean; folder: string; device: Device },
): void {
  device = options.device
  const { threads, instructionSet, cuda } = native.backend()
  const onCpu = device === 'cpu'
  const ceiling = onCpu ? native.ceilings() : cudaCeilings()
  const name = onCpu ? (cpus()[0]?.model ?? 'cpu') : cuda.devices[0]!.name
  process.stdout.write(onCpu ? `${name}, ${threads} threads, ${instructionSet}: ` : `${name}: `)
  const product = onCpu ? 'FMA in registers' : 'bfloat16 product 8192^3'
  process.stdout.write(`${round(ceiling.gflops)} GFLOP/s ${product}, ${round(ceiling.gbps)} GB/s copy\n`)
  for (const { op, run } of registered) {
    if (filters.length && !filters.includes(op)) continue
    const rows = (onCpu ? (['float32'] as const) : (['bfloat16', 'float32'] as const)).flatMap(dtype => {
      if (!onCpu && dtype === 'bfloat16' && float32Only.has(op)) return []
      return scope(() => run(ceiling, dtype))
    })
    print(op, rows)
    if (!options.save) continue
    const result: Result = {
      device: name,
      ...(onCpu ? { threads, instructionSet } : { driver: cuda.driver, cuda: cuda.runtime }),
      node: process.version,
      commit: commit(),
      date: new Date().toISOString(),
      command: `npm run bench -- --save --device ${onCpu ? 'cpu' : 'cuda'} ${op}`,
      ceiling,
      rows,
    }
    mkdirSync(options.folder, { recursive: true })
    writeFileSync(join(options.folder, `${op}.json`), `${JSON.stringify(result, null, 2)}\n`)
  }
}
