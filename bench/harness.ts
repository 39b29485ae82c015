import { execFileSync } from 'node:child_process'
import { mkdirSync, writeFileSync } from 'node:fs'
import { cpus } from 'node:os'
import { join } from 'node:path'
import Benchmark from 'benchmark'
import { record, valueAndGrad } from '#lib/autograd.js'
import { native, packageRoot } from '#lib/native.js'
import { Random } from '#lib/random.js'
import { type Device, emptyLike, scope, Tensor } from '#lib/tensor.js'
import type { Values } from '../test/harness.js'

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
  threads: number
  instructionSet: string
  node: string
  commit: string
  date: string
  command: string
  ceiling: { gflops: number; gbps: number }
  rows: Row[]
}

const registered: { op: string; run: (ceiling: Result['ceiling']) => Row[] }[] = []

/** Where the benches of this run compute. */
const device: Device = 'cpu'

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

function toTensors(inputs: Record<string, Values | null>): Record<string, Tensor> {
  const tensors: Record<string, Tensor> = {}
  for (const [name, values] of Object.entries(inputs)) {
    if (!values) continue
    const float = values.kind === 'float' || values.kind === 'float32'
    tensors[name] = Tensor.from(float ? Float32Array.from(values.data) : values.data, values.shape)
  }
  return tensors
}

/** A scalar whose gradient reaches every output as ones, at no cost to speak of. */
function headOf(outputs: readonly Tensor[], ones: readonly Tensor[]): Tensor {
  return record('head', Tensor.zeros([1]), outputs, () => [...ones])
}

/** Registers an op's bench: the same inputs as its tests, at realistic sizes, float32. */
export function benchOp<C extends Record<string, Scalar>>(op: string, bench: OpBench<C>): void {
  registered.push({
    op,
    run: ceiling =>
      bench.cases.map(c =>
        scope(() => {
          const tensors = toTensors(bench.inputs(c, new Random(1)))
          const outputs = (() => {
            const out = bench.run(tensors, c)
            return out instanceof Tensor ? [out] : out
          })()
          const work = bench.flops?.(c) ?? bench.bytes?.(c) ?? 0
          const unit = bench.flops ? 'GFLOP/s' : 'GB/s'
          const forward = seconds(`${op} ${c.case}`, () => scope(() => void bench.run(tensors, c)))
          const row: Row = { ...c, dtype: 'float32', unit, ms: round(forward * 1e3), hstu: round(work / forward / 1e9) }
          if (bench.gradients) {
            const ones = outputs.map(output => {
              const one = emptyLike(output)
              if (output.dtype === 'float32') one.write(new Float32Array(output.size).fill(1))
              return one
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

/** Registers something larger than an op (a training step): `run` returns its rows. */
export function benchCase(name: string, run: () => Row[]): void {
  registered.push({ op: name, run })
}

export const timed = seconds

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

/** Runs what was registered whose name is or begins with one of `filters` (all where there are none). */
export function runBenches(filters: readonly string[], options: { save: boolean; folder: string }): void {
  const { threads, instructionSet } = native.backend()
  const ceiling = native.ceilings()
  const device = cpus()[0]?.model ?? 'cpu'
  process.stdout.write(`${device}, ${threads} threads, ${instructionSet}: `)
  process.stdout.write(`${round(ceiling.gflops)} GFLOP/s FMA in registers, ${round(ceiling.gbps)} GB/s copy\n`)
  for (const { op, run } of registered) {
    if (filters.length && !filters.some(filter => op === filter)) continue
    const rows = run(ceiling)
    print(op, rows)
    if (!options.save) continue
    const result: Result = {
      device,
      threads,
      instructionSet,
      node: process.version,
      commit: commit(),
      date: new Date().toISOString(),
      command: `npm run bench -- --save ${op}`,
      ceiling,
      rows,
    }
    mkdirSync(options.folder, { recursive: true })
    writeFileSync(join(options.folder, `${op}.json`), `${JSON.stringify(result, null, 2)}\n`)
  }
}
