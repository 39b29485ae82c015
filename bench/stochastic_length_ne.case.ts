import { spawnSync } from 'node:child_process'
import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { lengthSelections, type SparsityReport } from '#lib/data/stochastic_length.js'
import type { BinaryMetrics } from '#lib/eval/ranking_metrics.js'
import { packageRoot } from '#lib/native.js'
import { benchCase, type Row, type Run } from './harness.js'

const data = join(process.env.HSTU_DATA ?? '', 'ml-100k')
const STREAM = ['users=2000', 'items=1000', 'categories=20', 'days=60', 'seed=1']

/** Records, made once, and what is trained on them. Histories of ml-100k have 106 rows on average, those of the stream up to 420. */
const sources = [
  { preset: 'ranking/ml-100k', prepare: ['--data', data], maxHistory: 200, needs: data },
  { preset: 'ranking/synthetic', prepare: STREAM.flatMap(pair => ['--set', pair]), maxHistory: 256, needs: null },
]

function hstu(args: readonly string[]): string {
  const cli = join(packageRoot, 'dist/cli.js')
  const { status, stdout, stderr } = spawnSync(process.execPath, [cli, ...args], {
    encoding: 'utf8',
    maxBuffer: 2 ** 28,
  })
  if (status !== 0) throw new Error(`hstu ${args.join(' ')} ended with ${status}:\n${stderr.slice(-2000)}`)
  return stdout
}

interface Report {
  seconds: number
  counted: Record<string, BinaryMetrics>
  sparsity: SparsityReport | null
}

/**
 * What Stochastic Length does to NE: presets trained in one pass at full length and by each selection, through the command line; `--only`
 * takes a part.
 */
benchCase('stochastic_length_ne', {
  dtypes: ['float32'],
  byName: true,
  run: ({ device, options }: Run) => {
    const rows: Row[] = []
    const scratch = mkdtempSync(join(tmpdir(), 'hstu-length-'))
    try {
      for (const { preset, prepare, maxHistory, needs } of sources.filter(source => options.only.test(source.preset))) {
        if (needs !== null && !existsSync(needs)) {
          process.stderr.write(`${preset}: NOT RUN, no ${needs}\n`)
          continue
        }
        const records = join(scratch, preset.replaceAll('/', '-'))
        hstu(['data', 'prepare', '--preset', preset, ...prepare, '--out', records, '--max-history', String(maxHistory)])
        let full: Record<string, BinaryMetrics> = {}
        for (const [at, selection] of [null, ...lengthSelections].entries()) {
          const short = selection ? ['--stochastic-length', '1.6', '--set', `lengthSelection=${selection}`] : []
          const settings = [
            '--set',
            `maxHistory=${maxHistory}`,
            '--seed',
            '0',
            '--device',
            device === 'cpu' ? 'cpu' : 'cuda',
          ]
          const to = ['--requests', records, '--out', join(scratch, `run-${rows.length}-${at}`), '--json']
          const { seconds, counted, sparsity } = JSON.parse(
            hstu(['rank', 'train', '--preset', preset, ...settings, ...short, ...to]),
          ) as Report
          if (!selection) full = counted
          for (const [task, { ne, auc }] of Object.entries(counted))
            rows.push({
              ...{ case: `${preset} ${task}`, selection: selection ?? 'none', alpha: selection ? 1.6 : 2, maxHistory },
              ...{
                sparsity: Number((sparsity?.sparsity ?? 0).toFixed(3)),
                meanLength: Math.round(sparsity?.meanLength ?? 0),
              },
              ...{
                meanKept: Math.round(sparsity?.meanKept ?? 0),
                ne: Number(ne.toFixed(4)),
                auc: Number(auc.toFixed(4)),
              },
              ...{
                change: Number((ne / full[task]!.ne - 1).toFixed(4)),
                seconds: Number(seconds.toFixed(1)),
                dtype: 'float32',
              },
            })
          process.stdout.write(`${JSON.stringify(rows.at(-1))}\n`)
        }
      }
    } finally {
      rmSync(scratch, { recursive: true, force: true })
    }
    return rows
  },
})
