import { mkdir, rename, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { HstuError } from '../errors.js'
import { METRIC_KS, type Metrics } from '../eval/metrics.js'
import { metric, table } from './output.js'
import { packageVersion } from './package.js'

/** HR and NDCG at every cut-off, and MRR. */
export function metricsTable(metrics: Metrics): string {
  const row = (name: string, key: 'hr' | 'ndcg') => [name, ...METRIC_KS.map(k => metric(metrics[`${key}@${k}`]!))]
  const lines = table(['@', ...METRIC_KS.map(String)], [row('HR', 'hr'), row('NDCG', 'ndcg')])
  return `${lines}\nMRR   ${metric(metrics.mrr)}`
}

/** What every report says about where it comes from. */
export function provenance(command: string) {
  const { platform, arch, version: node } = process
  return { command, version: packageVersion(), date: new Date().toISOString(), node, platform: `${platform}-${arch}` }
}

/** Writes `report.json`, and before it `report.txt`, where there is a text to read: who finds the first finds both whole. */
export async function writeReport(folder: string, report: unknown, text?: string): Promise<string> {
  await makeFolder(folder)
  if (text !== undefined) await writeWhole(join(folder, 'report.txt'), `${text}\n`)
  const path = join(folder, 'report.json')
  await writeWhole(path, `${JSON.stringify(report, null, 2)}\n`)
  return path
}

async function writeWhole(path: string, content: string): Promise<void> {
  const temporary = `${path}.${process.pid}.tmp`
  try {
    await writeFile(temporary, content)
    await rename(temporary, path)
  } catch (error) {
    await rm(temporary, { force: true }).catch(() => {})
    throw unwritable(path, error)
  }
}

export const filterText = {
  history: 'items of the history left out',
  all: 'all items of the user left out',
  none: 'no item left out',
} as const

/** Makes a folder to write into. @throws HstuError ERR_HSTU_CHECKPOINT naming it and why it cannot be. */
export async function makeFolder(folder: string): Promise<void> {
  await mkdir(folder, { recursive: true }).catch(error => {
    throw unwritable(folder, error)
  })
}

function unwritable(path: string, cause: unknown): HstuError {
  const reason = cause instanceof Error ? cause.message : String(cause)
  return new HstuError('ERR_HSTU_CHECKPOINT', `${path} cannot be written: ${reason}`, { cause })
}
