import { execFileSync } from 'node:child_process'
import { cpus } from 'node:os'
import { native, packageRoot } from '#lib/native.js'
import type { Device } from '#lib/tensor.js'
import type { Ceiling } from './ceilings.js'

export type Scalar = number | string | boolean | undefined
/** A figure, or [forward, backward]. */
export type Value = number | number[]

/**
 * One case of a result file: `case`, shape letters, `dtype` and `unit`; ours under `hstu`, peers of the same run under their names, those
 * of other runs under `published`; `share` of the ceiling and of each peer. Pairs are [forward, backward].
 */
export interface Row {
  [key: string]: Scalar | Value | Record<string, Value>
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
  ceiling?: Ceiling
  rows: Row[]
}

/** The rows as they are shown on the terminal. */
export function print(op: string, rows: readonly Row[]): void {
  const text = (value: unknown) => (Array.isArray(value) ? value.join(' | ') : String(value ?? ''))
  const percent = (value: Value) =>
    [value]
      .flat()
      .map(x => `${Math.round(100 * x)}`)
      .join(' | ')
  for (const row of rows) {
    const { case: name, dtype, unit, ms, hstu, ceiling: _, share = {}, published: _published, ...shape } = row
    const plain = Object.entries(shape).filter(([, value]) => typeof value !== 'object' || Array.isArray(value))
    const letters = plain.map(([key, value]) => `${key} ${text(value)}`)
    const shares = Object.entries(share as Record<string, Value>).map(([of, value]) => `${percent(value)}% of ${of}`)
    process.stdout.write(
      `${op.padEnd(22)} ${String(name).padEnd(18)} ${`${letters.join(', ')}, ${dtype}`.padEnd(48)} ${ms === undefined ? '' : `${text(ms).padStart(18)} ms`} ` +
        `${unit === 'ms' || hstu === undefined ? '' : `${text(hstu).padStart(16)} ${unit}`}  ${shares.join(', ')}\n`,
    )
  }
}

export function commit(): string {
  if (process.env.HSTU_COMMIT) return process.env.HSTU_COMMIT
  const git = (...args: string[]) => execFileSync('git', args, { cwd: packageRoot, encoding: 'utf8' }).trim()
  try {
    return git('rev-parse', 'HEAD') + (git('status', '--porcelain', '--', 'csrc', 'cuda', 'lib') ? '-dirty' : '')
  } catch {
    return 'unknown'
  }
}

/** What stands above the rows of a result file. */
export function provenance(device: Device, name: string): Omit<Result, 'ceiling' | 'rows'> {
  const { threads, instructionSet, cuda } = native.backend()
  const onCpu = device === 'cpu'
  return {
    device: onCpu ? (cpus()[0]?.model ?? 'cpu') : cuda.devices[0]!.name,
    ...(onCpu ? { threads, instructionSet } : { driver: cuda.driver, cuda: cuda.runtime }),
    node: process.version,
    commit: commit(),
    date: new Date().toISOString(),
    command: `npm run bench -- --save --device ${onCpu ? 'cpu' : 'cuda'} ${name}`,
  }
}
