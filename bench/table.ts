import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { basename, join } from 'node:path'
import type { Result, Row, Value } from './report.js'

/** What the README shows; every other result stays in bench/results. */
const shown = [
  ...['linear', 'norm_linear_silu', 'norm_gate_linear', 'hstu_attention', 'attention', 'sampled_softmax_loss'],
  ...['softmax_loss', 'embedding', 'layer_norm', 'adamw', 'top_k', 'target_rank', 'encoder', 'training_step'],
]

const text = (value: unknown) => (Array.isArray(value) ? value.join(' \\| ') : String(value ?? ''))

function shapeOf({
  case: _case,
  unit: _unit,
  ms: _ms,
  hstu: _hstu,
  ceiling: _ceiling,
  published: _,
  share: _share,
  sequences: _sequences,
  ...shape
}: Row) {
  return Object.entries(shape)
    .filter(([key]) => !['fa2', 'fa2_nested', 'cudnn', 'cublas', 'pytorch'].includes(key))
    .map(([key, value]) => (key === 'dtype' ? String(value) : `${key} ${text(value)}`))
    .join(', ')
}

/** Our share of each peer; an asterisk where the peer's figure is of another run. */
function peersOf({ share = {}, ...row }: Row): string {
  const peers = Object.entries(share as Record<string, Value>).filter(([name]) => name !== 'ceiling')
  return peers.map(([name, value]) => `${name}${name in row ? '' : '*'} ${text(value)}`).join(', ')
}

/** Results of before shares were written have the ceiling alone. */
function ofCeiling({ hstu, ceiling }: Row): Value | undefined {
  if (typeof ceiling !== 'number') return undefined
  const shares = [hstu as Value].flat().map(x => Number((x / ceiling).toPrecision(3)))
  return shares.length === 1 ? shares[0] : shares
}

function read(folder: string, op: string): Result | null {
  const file = join(folder, `${op}.json`)
  return existsSync(file) ? (JSON.parse(readFileSync(file, 'utf8')) as Result) : null
}

/** On a GPU the float32 rows of ops stay in their files. */
function isShown(row: Row, result: Result, op: string): boolean {
  return result.threads !== undefined || row.dtype !== 'float32' || ['training_step', 'adamw'].includes(op)
}

/** The README's table of speed of one device, from its result files. */
export function speedTable(folder: string): string {
  const results = shown.flatMap(op => {
    const result = read(folder, op)
    return result ? [{ op, result }] : []
  })
  const first = results[0]?.result
  if (!first) return ''
  const host = first.threads ? `, ${first.threads} threads, ${first.instructionSet}` : ''
  const lines = [`**${first.device}**${host}; forward \\| backward where there are two.`, '']
  lines.push('| op | case | ms | rate | of the ceiling | of peers |', '|---|---|---|---|---|---|')
  for (const { op, result } of results)
    for (const row of result.rows.filter(row => isShown(row, result, op))) {
      const rate = row.unit === 'ms' ? '' : `${text(row.hstu)} ${row.unit}`
      const ceiling = text((row.share as Record<string, Value> | undefined)?.ceiling ?? ofCeiling(row))
      lines.push(`| ${op} | ${row.case}: ${shapeOf(row)} | ${text(row.ms)} | ${rate} | ${ceiling} | ${peersOf(row)} |`)
    }
  const commits = [...new Set(results.map(({ result }) => result.commit.slice(0, 12)))]
  return [...lines, '', `Measured at ${commits.join(', ')}.`].join('\n')
}

const fraction = (value: unknown) => Number(value).toFixed(4).replace(/^0/, '')

/** The README's table of quality: a line a model, device and precision. */
export function qualityTable(folders: readonly string[]): string {
  const lines = ['| model | device | seeds: HR@10 / NDCG@10 | mean | seconds |', '|---|---|---|---|---|']
  const commits = new Set<string>()
  for (const folder of folders) {
    const result = read(folder, 'quality')
    if (!result) continue
    const nameOf = (row: Row) => `${row.case}, ${row.dtype}`
    for (const name of new Set(result.rows.map(nameOf))) {
      const rows = result.rows.filter(row => nameOf(row) === name)
      const [hr, ndcg] = ['hr@10', 'ndcg@10'].map(key => rows.map(row => Number(row[key])))
      const mean = (values: readonly number[]) => fraction(values.reduce((a, b) => a + b, 0) / values.length)
      const each = rows.map((_, i) => `${fraction(hr![i])} / ${fraction(ndcg![i])}`).join(', ')
      const alone = rows.flatMap(row => (row.seconds === undefined ? [] : [Number(row.seconds)])) // the others shared the device
      const [least, most] = [Math.min(...alone), Math.max(...alone)].map(Math.round)
      const range = alone.length === 0 ? '' : least === most ? `${least}` : `${least} to ${most}`
      lines.push(`| ${name} | ${result.device} | ${each} | ${mean(hr!)} / ${mean(ndcg!)} | ${range} |`)
      for (const row of rows) commits.add(String(row.commit).slice(0, 12))
    }
  }
  const files = folders
    .filter(folder => read(folder, 'quality'))
    .map(folder => `\`bench/results/${basename(folder)}/quality.json\``)
  return [...lines, '', `Measured at ${[...commits].join(', ')}; all metrics and commands: ${files.join(', ')}.`].join(
    '\n',
  )
}

/** The README's table of ranking: a line a log, task and model, seeds side by side. */
export function rankingTable(folders: readonly string[]): string {
  const lines = ['| data, task | model | device | NE | AUC |', '|---|---|---|---|---|']
  const [commits, files] = [new Set<string>(), new Set<string>()]
  for (const folder of folders) {
    const result = read(folder, 'ranking')
    if (!result) continue
    files.add(`\`bench/results/${basename(folder)}/ranking.json\``)
    const passes = ({ passes }: Row) => (passes === 1 ? 'one pass' : `${passes} passes`)
    const modelOf = (row: Row) =>
      row.model === 'GenerativeRanker' ? `**${row.model}, ${passes(row)}**` : `${row.model}`
    const lineOf = (row: Row) => `| ${row.data}, ${row.task} | ${modelOf(row)} | ${result.device} |`
    const tasks = new Set(result.rows.map(({ data, task }) => `${data} ${task}`))
    for (const task of tasks) {
      const own = result.rows.filter(row => `${row.data} ${row.task}` === task)
      for (const line of new Set(own.map(lineOf))) {
        const rows = own.filter(row => lineOf(row) === line)
        const seeds = (key: string) => rows.map(row => fraction(row[key])).join(', ')
        lines.push(`${line} ${seeds('ne')} | ${seeds('auc')} |`)
        for (const row of rows) commits.add(String(row.commit).slice(0, 12))
      }
    }
  }
  if (files.size === 0) return ''
  return [...lines, '', `Measured at ${[...commits].join(', ')}; commands and GAUC: ${[...files].join(', ')}.`].join(
    '\n',
  )
}

/** Replaces what stands between the markers of `name`. */
function replace(readme: string, name: string, content: string): string {
  const [begin, end] = [`<!-- ${name}:begin -->`, `<!-- ${name}:end -->`]
  const [from, to] = [readme.indexOf(begin), readme.indexOf(end)]
  if (from < 0 || to < from) throw new Error(`README.md: no ${begin} ... ${end}`)
  return `${readme.slice(0, from + begin.length)}\n${content}\n${readme.slice(to)}`
}

/** Rewrites the tables of the README from the results of all devices. */
export function rewriteReadme(file: string, results: string): void {
  const folders = readdirSync(results)
    .sort()
    .map(name => join(results, name))
  const speed = folders.map(speedTable).filter(table => table !== '')
  const readme = replace(readFileSync(file, 'utf8'), 'bench', speed.join('\n\n'))
  writeFileSync(file, replace(replace(readme, 'quality', qualityTable(folders)), 'ranking', rankingTable(folders)))
}
