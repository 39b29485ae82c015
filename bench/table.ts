import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import type { Result, Row } from './harness.js'

const begin = '<!-- bench:begin -->'
const end = '<!-- bench:end -->'
/** What the README shows; every other result stays in bench/results. */
const shown = [
  ...['linear', 'norm_linear_silu', 'norm_gate_linear', 'hstu_attention', 'hstu_attention_h200'],
  ...['sampled_softmax_loss', 'training_step'],
]

const text = (value: unknown) => (Array.isArray(value) ? value.join(' \\| ') : String(value ?? ''))

function shapeOf(row: Row): string {
  const { case: _case, unit: _unit, ms: _ms, hstu: _hstu, ceiling: _ceiling, ...shape } = row
  return Object.entries(shape)
    .map(([key, value]) => (key === 'dtype' ? String(value) : `${key} ${text(value)}`))
    .join(', ')
}

/** The README's table of one device, from its result files. */
export function tableOf(folder: string): string {
  const results = readdirSync(folder)
    .filter(file => file.endsWith('.json'))
    .map(file => ({ op: file.slice(0, -5), ...(JSON.parse(readFileSync(join(folder, file), 'utf8')) as Result) }))
  const lines: string[] = []
  const rows = shown.flatMap(op => results.filter(result => result.op === op))
  const first = rows[0]
  if (!first) return ''
  const host = first.threads ? `, ${first.threads} threads, ${first.instructionSet}` : ''
  lines.push(`**${first.device}**${host}; forward \\| backward where there are two.`, '')
  lines.push('| op | case | ms | rate | ceiling |', '|---|---|---|---|---|')
  for (const { op, rows: cases } of rows)
    for (const row of cases) {
      const rate = row.unit === 'ms' ? '' : `${text(row.hstu)} ${row.unit}`
      lines.push(`| ${op} | ${row.case}: ${shapeOf(row)} | ${text(row.ms)} | ${rate} | ${text(row.ceiling)} |`)
    }
  const commits = [...new Set(rows.map(result => result.commit.slice(0, 12)))]
  lines.push('', `Measured at ${commits.join(', ')}.`)
  return lines.join('\n')
}

/** Rewrites what stands between the markers of a README: one table a device that has results. */
export function rewriteReadme(file: string, folders: readonly string[]): void {
  if (!existsSync(file)) return
  const readme = readFileSync(file, 'utf8')
  const [from, to] = [readme.indexOf(begin), readme.indexOf(end)]
  if (from < 0 || to < from) throw new Error(`${file}: no ${begin} ... ${end}`)
  const tables = folders.filter(folder => existsSync(folder)).map(tableOf)
  writeFileSync(file, `${readme.slice(0, from + begin.length)}\n${tables.join('\n\n')}\n${readme.slice(to)}`)
}
