import { spawnSync } from 'node:child_process'
import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { packageRoot } from '#lib/native.js'
import { benchCase, type Row, type Run } from './harness.js'
import { commit } from './report.js'

const folder = process.env.HSTU_DATA ?? ''
const seeds = [0, 1, 2]
/** Each preset with the folder of its log; the first of a log brings the baselines: with seed 0 all of them, with the others DIN, which draws. */
const presets: readonly [preset: string, data: string][] = [
  ['ranking/ml-100k', 'ml-100k'],
  ['ranking/ml-100k-passes', 'ml-100k'],
  ['ranking/deskdrop', 'deskdrop'],
  ['ranking/deskdrop-passes', 'deskdrop'],
]

interface Metrics {
  ne: number
  auc: number
  gauc: number
  calibration: number
}

interface Report {
  options: { passes: number }
  auxiliary: string[]
  seconds: number
  counted: Record<string, Metrics>
  baselines: { task: string; baseline: string; metrics: Metrics }[]
}

/** Trains a preset by the command line. @returns its rows: one a task and model */
function train(preset: string, data: string, seed: number, device: string, baselines: boolean): Row[] {
  const out = mkdtempSync(join(tmpdir(), 'hstu-ranking-'))
  try {
    const args = ['rank', 'train', '--preset', preset, '--data', join(folder, data), '--seed', String(seed)]
    args.push('--baselines', baselines ? 'all' : 'none', '--device', device)
    const command = ['npx', 'hstu', ...args].join(' ').replaceAll(folder, '$HSTU_DATA')
    const cli = [join(packageRoot, 'dist/cli.js'), ...args, '--out', join(out, 'run'), '--json']
    const { status, stdout, stderr } = spawnSync(process.execPath, cli, { encoding: 'utf8', maxBuffer: 2 ** 28 })
    if (status !== 0) throw new Error(`${command} ended with ${status}:\n${stderr.slice(-2000)}`)
    const { options, auxiliary, seconds, counted, baselines: others } = JSON.parse(stdout) as Report
    const rowOf = (task: string, model: string, { ne, auc, gauc, calibration }: Metrics): Row => {
      const metrics = Object.entries({ ne, auc, gauc, calibration }).map(([key, x]) => [key, Number(x.toFixed(4))])
      return {
        ...{ case: preset, data, task, model, seed, passes: options.passes, dtype: 'float32' },
        ...(Object.fromEntries(metrics) as Record<string, number>),
        ...(model === RANKER ? { seconds: Number(seconds.toFixed(1)) } : {}),
        ...{ commit: commit(), date: new Date().toISOString().slice(0, 10), command },
      }
    }
    return [
      ...others
        .filter(({ baseline }) => seed === 0 || baseline.startsWith('DIN'))
        .map(({ task, baseline, metrics }) => rowOf(task, baseline, metrics)),
      ...Object.entries(counted).flatMap(([task, metrics]) =>
        auxiliary.includes(task) ? [] : [rowOf(task, RANKER, metrics)],
      ),
    ]
  } finally {
    rmSync(out, { recursive: true, force: true })
  }
}

const RANKER = 'GenerativeRanker'

/** Trains the ranking presets on real data; see `quality`: what is there at the same commit is not made again. */
benchCase('ranking', {
  dtypes: ['float32'],
  byName: true,
  run: (run: Run) => {
    const device = run.device === 'cpu' ? 'cpu' : 'cuda'
    let rows = [...run.before]
    for (const [preset, data] of presets)
      for (const seed of seeds) {
        const same = (row: Row) => row.case === preset && row.seed === seed
        if (!run.options.only.test(`${preset} ${seed}`)) continue
        if (!folder || !existsSync(join(folder, data))) {
          process.stderr.write(`${preset}: NOT RUN, no ${data} in HSTU_DATA\n`)
          continue
        }
        if (rows.some(row => same(row) && row.commit === commit())) continue
        const made = train(preset, data, seed, device, presets.find(([, log]) => log === data)![0] === preset)
        for (const { task, model, ne, auc } of made)
          process.stdout.write(`${preset} seed ${seed} ${task}, ${model}: NE ${ne}, AUC ${auc}\n`)
        rows = [...rows.filter(row => !same(row)), ...made]
        const place = (row: Row) => presets.findIndex(([name]) => name === row.case) * seeds.length + Number(row.seed)
        rows.sort((a, b) => place(a) - place(b))
        run.keep(rows)
      }
    return rows
  },
})
