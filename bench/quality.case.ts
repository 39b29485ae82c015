import { spawnSync } from 'node:child_process'
import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { packageRoot } from '#lib/native.js'
import { benchCase, type Row, type Run } from './harness.js'
import { commit } from './report.js'
import { precisions } from './training_step.case.js'

const folder = process.env.HSTU_DATA ?? ''

interface Training {
  case: string
  seed: number
  dtype: string
  /** Arguments of `hstu train` but for the device. */
  args: string[]
}

const sources: Record<string, { preset: string; data: Record<string, string>; models: string[]; seeds: number[] }> = {
  'ml-100k': {
    preset: 'ml-100k',
    data: { data: 'ml-100k/ml-100k.inter' },
    ...{ models: ['hstu', 'hstu-large', 'sasrec'], seeds: [0, 1, 2] },
  },
  beauty: {
    preset: 'amazon',
    data: { data: 'amazon/beauty.txt', times: 'amazon/beauty_time.txt' },
    ...{ models: ['hstu', 'hstu-large', 'sasrec'], seeds: [0, 1, 2] },
  },
  toys: { preset: 'amazon', data: { data: 'amazon/toys.txt' }, models: ['hstu', 'sasrec'], seeds: [0] },
}

function trainings(device: string): Training[] {
  return precisions(device).flatMap(dtype =>
    Object.entries(sources).flatMap(([source, { preset, data, models, seeds }]) =>
      models.flatMap(model =>
        seeds.map(seed => ({
          ...{ case: `${source}/${model}`, seed, dtype },
          args: [
            ...Object.entries(data).flatMap(([flag, file]) => [`--${flag}`, join(folder, file)]),
            ...['--preset', `${preset}/${model}`, '--seed', String(seed)],
            ...(dtype === 'float32' ? [] : ['--set', `precision=${dtype}`]),
          ],
        })),
      ),
    ),
  )
}

interface Report {
  test: Record<string, number>
  epochs: number
  steps: number
  seconds: number
  best: { epoch: number } | null
}

function train(training: Training, device: string): Row {
  const out = mkdtempSync(join(tmpdir(), 'hstu-quality-'))
  try {
    const args = ['train', ...training.args, '--device', device]
    const command = ['npx', 'hstu', ...args].join(' ').replaceAll(folder, '$HSTU_DATA')
    const start = performance.now()
    const cli = [join(packageRoot, 'dist/cli.js'), ...args, '--out', join(out, 'run'), '--json']
    const { status, stdout, stderr } = spawnSync(process.execPath, cli, { encoding: 'utf8', maxBuffer: 2 ** 28 })
    if (status !== 0) throw new Error(`${command} ended with ${status}:\n${stderr.slice(-2000)}`)
    const { test, epochs, steps, seconds, best } = JSON.parse(stdout) as Report
    const { args: _, ...key } = training
    const metrics = ['hr@10', 'ndcg@10', 'hr@50', 'hr@200', 'mrr'].map(name => [name, Number(test[name]!.toFixed(4))])
    return {
      ...{ ...key, ...(Object.fromEntries(metrics) as Record<string, number>) },
      ...{ epochs, bestEpoch: best?.epoch, steps, seconds: Number(seconds.toFixed(1)) },
      ...{ wallSeconds: Number(((performance.now() - start) / 1e3).toFixed(1)) },
      ...{ commit: commit(), date: new Date().toISOString().slice(0, 10), command },
    }
  } finally {
    rmSync(out, { recursive: true, force: true })
  }
}

const same = (a: Row, b: Row | Training) => a.case === b.case && a.seed === b.seed && a.dtype === b.dtype

/**
 * Trains presets on real data through the command line and keeps what the test gives. Rows of the same commit are not made again, and
 * the file is written after each: a run that was cut short goes on where it was, and `--only` takes a part.
 */
benchCase('quality', {
  dtypes: ['float32'],
  byName: true,
  run: (run: Run) => {
    const device = run.device === 'cpu' ? 'cpu' : 'cuda'
    const all = trainings(device)
    let rows = [...run.before]
    for (const training of all.filter(({ case: name, dtype }) => run.options.only.test(`${name} ${dtype}`))) {
      const data = training.args[1]!
      if (!folder || !existsSync(data)) {
        process.stderr.write(`${training.case}: NOT RUN, no ${data || 'HSTU_DATA'}\n`)
        continue
      }
      if (rows.some(row => same(row, training) && row.commit === commit())) continue
      const made = train(training, device)
      process.stdout.write(`${made.case} seed ${made.seed} ${made.dtype}: HR@10 ${made['hr@10']}, ${made.seconds} s\n`)
      rows = [...rows.filter(row => !same(row, training)), made]
      const place = (row: Row) => all.findIndex(each => same(row, each))
      rows.sort((a, b) => place(a) - place(b))
      run.keep(rows)
    }
    return rows
  },
})
