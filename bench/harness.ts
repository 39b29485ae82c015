import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { record, valueAndGrad } from '#lib/autograd.js'
import { cast } from '#lib/ops/cast.js'
import { Random } from '#lib/random.js'
import { type Device, emptyLike, scope, Tensor } from '#lib/tensor.js'
import { normal as drawn, isFloat, type Values } from '../test/values.js'
import { capture } from './calls.js'
import { type Ceiling, measureCeilings, noise } from './ceilings.js'
import { type PeerRow, peersIn, publishedPeers, torchPeers } from './peers.js'
import { print, provenance, type Result, type Row, type Scalar, type Value } from './report.js'
import { secondsOf } from './timing.js'

export type { Row } from './report.js'

export type FloatDtype = 'float32' | 'bfloat16'

export interface OpBench<C extends Record<string, Scalar>> {
  /** `case` labels the row; the other keys are shape letters and options, copied into the result. */
  cases: readonly (C & { case: string })[]
  /** Further cases on CUDA, too large for the CPU. */
  cudaCases?: readonly (C & { case: string })[]
  inputs: (c: C, random: Random) => Record<string, Values | null>
  run: (t: Record<string, Tensor>, c: C) => Tensor | readonly Tensor[]
  /** Inputs whose gradient is timed: the row then holds [forward, backward]. */
  gradients?: readonly string[]
  /** Dtypes measured on CUDA; default bfloat16 and float32. */
  dtypes?: readonly FloatDtype[]
  /** Floating-point operations of the forward. The row is in floating-point operations a second; without, in GB/s. */
  flops?: (c: C) => number
  /** Default: twice the forward's. */
  backwardFlops?: (c: C) => number
  /** Bytes that the forward must read and write at least; F is the bytes of a float. */
  bytes?: (c: C, F: number) => number
  /** Default: twice the forward's. */
  backwardBytes?: (c: C, F: number) => number
  /** Keys of the same case among the published peers. */
  peer?: (c: C) => Record<string, number | string>
}

/** Where and against what a bench runs. */
export interface Run {
  device: Device
  dtype: FloatDtype
  ceiling: Ceiling
  /** Rows of the peers measured in this run. */
  peers: readonly PeerRow[]
  options: RunOptions
  /** Rows of this bench in the file that is to be written, and a way to write it before the end. */
  before: readonly Row[]
  keep: (rows: readonly Row[]) => void
}

/** How benches are run: the flags of bench/run.ts. */
export interface RunOptions {
  save: boolean
  folder: string
  device: Device
  /** Of soak: steps. */
  steps: number
  /** Of quality, stochastic_length_ne, training_step and encoder: cases whose name this matches. */
  only: RegExp
}

/** The same name as the peers' tables. */
export const labelOf = (dtype: FloatDtype) => (dtype === 'bfloat16' ? 'bf16' : dtype)

interface Registered {
  op: string
  run: (run: Run) => Row[] | Promise<Row[]>
  dtypes: readonly FloatDtype[]
  /** Takes minutes: runs only where it is named. */
  byName?: boolean
  /** What the peers' script is to measure. */
  peerCases?: readonly object[]
}

const registered: Registered[] = []

export function round(x: number): number {
  return Number(x.toPrecision(4))
}

/** Of larger inputs so many are drawn, a prime number, which toTensors repeats: rows of one input differ. */
const DRAWN = 2 ** 20 - 3

/** N(0, 1) of any size, at once. */
export function normal(random: Random, shape: readonly number[], scale = 1): Values {
  const size = shape.reduce((a, b) => a * b, 1)
  return { ...drawn(random, [Math.min(size, DRAWN)], scale), shape } as Values
}

/** float32 [size]: `data`, again and again where it is what `normal` draws. */
function repeated(data: ArrayLike<number>, size: number): Float32Array<ArrayBuffer> {
  if (data.length !== size && (data.length !== DRAWN || size < DRAWN))
    throw new Error(`an input of ${size} elements has ${data.length} values`)
  const all = new Float32Array(size)
  all.set(data)
  for (let at = data.length; at < size; at *= 2) all.copyWithin(at, 0, Math.min(at, size - at))
  return all
}

/** Times in seconds with lognormal gaps, median 600 s, sigma 2. */
export function lognormalSeconds(tokens: number): BigInt64Array<ArrayBuffer> {
  const random = new Random(1)
  let time = 1_600_000_000
  return BigInt64Array.from({ length: tokens }, () => BigInt((time += Math.floor(600 * Math.exp(2 * random.normal())))))
}

/** The same on the device, int64 [tokens]. */
export const lognormalTimes = (tokens: number, device: Device): Tensor =>
  Tensor.from(lognormalSeconds(tokens), [tokens], { device })

function toTensors(inputs: Record<string, Values | null>, { dtype, device }: Run): Record<string, Tensor> {
  const tensors: Record<string, Tensor> = {}
  for (const [name, values] of Object.entries(inputs)) {
    if (!values) continue
    const { kind, shape, data } = values
    if (kind === 'int32' || kind === 'int64') tensors[name] = Tensor.from(data, shape, { device })
    else {
      const values = repeated(
        data,
        shape.reduce((a, b) => a * b, 1),
      )
      tensors[name] = cast(Tensor.from(values, shape, { device }), kind === 'float' ? dtype : 'float32')
    }
  }
  return tensors
}

/** One measurement: what took how long, and how long it would take at the ceiling. */
export interface Measured {
  seconds: number
  work: number
  limit: number
}

const single = (values: readonly number[]) =>
  values.length === 1 || values[0] === values[1] ? values[0]! : [...values]

/** Share of `theirs` that `ours` reaches; of times the other way round. */
export function shareOf(ours: Value, theirs: Value, unit: string): Value {
  const [a, b] = [[ours].flat(), [theirs].flat()]
  return single(a.map((x, i) => round(unit === 'ms' ? b[i % b.length]! / x : x / b[i % b.length]!)))
}

/** The row of a case in the unit of its work: TFLOP/s, GFLOP/s or GB/s. */
export function rowOf(
  shape: Record<string, Scalar>,
  unit: string,
  parts: readonly Measured[],
  run: Run,
  key?: object,
): Row {
  const per = unit === 'TFLOP/s' ? 1e12 : 1e9
  const pair = (of: (part: Measured) => number) => {
    const values = parts.map(part => round(of(part)))
    return values.length === 1 ? values[0]! : values
  }
  const hstu = pair(({ work, seconds }) => work / seconds / per)
  const ms = pair(({ seconds }) => seconds * 1e3)
  const ceiling = single(parts.map(({ work, limit }) => round(work / limit / per)))
  const share: Record<string, Value> = { ceiling: pair(({ seconds, limit }) => limit / seconds) }
  const row: Row = { ...shape, dtype: shape.dtype ?? labelOf(run.dtype), unit, ms, hstu, ceiling }
  return withPeers(row, share, run, key)
}

/** Adds the peers of this run, the published ones and our share of each. */
export function withPeers(row: Row, share: Record<string, Value>, run: Run, key?: object): Row {
  const own = key ? peersIn(run.peers, key as Record<string, number>) : {}
  const published = key && run.device !== 'cpu' ? publishedPeers(key as Record<string, number>) : {}
  for (const [name, value] of Object.entries({ ...published, ...own }))
    share[name] = shareOf(row.hstu as Value, value, String(row.unit))
  return { ...row, ...own, ...(Object.keys(published).length ? { published } : {}), share }
}

/** A scalar, recorded so that the gradients of the outputs are `douts`; `begin` is called when the backward begins. */
function headOf(outputs: readonly Tensor[], douts: readonly Tensor[], begin: () => void): Tensor {
  return record('head', Tensor.zeros([1], { device: outputs[0]!.device }), outputs, () => {
    begin()
    return [...douts]
  })
}

/** Seconds of the forward of `op`, and of its backward for the gradients of `params`. */
export function timePair(
  name: string,
  op: () => readonly Tensor[],
  params: readonly Tensor[],
  device: Device,
): number[] {
  return scope(() => {
    const forward = capture(() => scope(() => void op()))
    const seconds = [secondsOf(name, forward.phases[0]!, device)]
    forward.dispose()
    if (params.length === 0) return seconds
    const douts = op().map(y => {
      if (!isFloat(y)) return emptyLike(y)
      const cols = y.shape.at(-1)!
      return noise(device, y.dtype as FloatDtype, 9, y.size / cols, cols).view(y.shape)
    })
    const both = capture(mark => scope(() => void valueAndGrad(params, () => headOf(op(), douts, mark))))
    seconds.push(secondsOf(`${name} backward`, both.phases[1]!, device))
    both.dispose()
    return seconds
  })
}

/** Registers an op's bench: the same inputs as its tests, at realistic sizes. */
export function benchOp<C extends Record<string, Scalar>>(op: string, bench: OpBench<C>): void {
  const rows = (run: Run): Row[] =>
    [...bench.cases, ...((run.device !== 'cpu' && bench.cudaCases) || [])].map(c =>
      scope(() => {
        const tensors = toTensors(bench.inputs(c, new Random(1)), run)
        const forward = () => [bench.run(tensors, c)].flat() as Tensor[]
        const params = (bench.gradients ?? []).filter(name => tensors[name]).map(name => tensors[name]!)
        const F = run.dtype === 'bfloat16' ? 2 : 4
        const [flops, bytes] = [bench.flops?.(c) ?? 0, bench.bytes?.(c, F) ?? 0]
        const work = [
          { flops, bytes },
          { flops: bench.backwardFlops?.(c) ?? 2 * flops, bytes: bench.backwardBytes?.(c, F) ?? 2 * bytes },
        ]
        const { gbps, product, tensorCores } = run.ceiling
        const peak = (run.dtype === 'bfloat16' && tensorCores) || product[run.dtype]!
        const seconds = timePair(`${op} ${c.case}`, forward, params, run.device)
        const parts = seconds.map((seconds, i) => {
          const { flops, bytes } = work[i]!
          const limit = Math.max(flops / peak, bytes / gbps) / 1e9
          return { seconds, work: bench.flops ? flops : bytes, limit }
        })
        const unit = bench.flops ? (run.device === 'cpu' ? 'GFLOP/s' : 'TFLOP/s') : 'GB/s'
        const key = bench.peer && { ...bench.peer(c), dtype: labelOf(run.dtype) }
        return rowOf(c, unit, parts, run, key)
      }),
    )
  const keys = [...bench.cases, ...(bench.cudaCases ?? [])].flatMap(c => (bench.peer ? [bench.peer(c)] : []))
  const peerCases = keys.filter(key => key.case === 'gemm').map(key => ({ ...key, dtype: 'bf16' }))
  registered.push({ op, run: rows, dtypes: bench.dtypes ?? ['bfloat16', 'float32'], peerCases })
}

/** Registers a bench of more than an op: `run` returns its rows, for each of `dtypes`. */
export function benchCase(op: string, bench: Omit<Registered, 'op'>): void {
  registered.push({ op, ...bench })
}

/** Runs what was registered whose name is one of `filters` (all but the long ones where there are none) and saves the results. */
export async function runBenches(filters: readonly string[], options: RunOptions): Promise<void> {
  const { device, folder } = options
  const onCpu = device === 'cpu'
  const benches = registered.filter(({ op, byName }) => (filters.length ? filters.includes(op) : !byName))
  if (benches.length === 0) throw new Error(`no bench of ${filters}; there are ${registered.map(({ op }) => op)}`)
  const long = benches.every(({ byName }) => byName)
  const peers = onCpu || long ? [] : torchPeers(benches.flatMap(({ peerCases = [] }) => peerCases))
  const ceiling = long ? { gbps: 0, product: {} } : measureCeilings(device, peers)
  if (!long) process.stdout.write(`${JSON.stringify(ceiling)}\n`)
  for (const { op, run, dtypes } of benches) {
    const file = join(folder, `${op}.json`)
    const before = existsSync(file) ? (JSON.parse(readFileSync(file, 'utf8')) as Result).rows : []
    const keep = (rows: readonly Row[]) => {
      if (!options.save || rows.length === 0) return
      mkdirSync(folder, { recursive: true })
      const result = { ...provenance(device, op), ...(long ? {} : { ceiling }), rows }
      writeFileSync(file, `${JSON.stringify(result, null, 2)}\n`)
    }
    const rows: Row[] = []
    for (const dtype of onCpu ? (['float32'] as const) : dtypes) {
      const more = await run({ device, dtype, ceiling, peers, options, before, keep })
      print(op, more)
      rows.push(...more)
    }
    keep(rows)
  }
}
