import { mkdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
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

export async function writeReport(folder: string, report: unknown): Promise<string> {
  await mkdir(folder, { recursive: true })
  const path = join(folder, 'report.json')
  await writeFile(path, `${JSON.stringify(report, null, 2)}\n`)
  return path
}

export const filterText = {
  history: 'items of the history left out',
  all: 'all items of the user left out',
  none: 'no item left out',
} as const
