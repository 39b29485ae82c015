import { statSync } from 'node:fs'
import { type DatasetReport, inspectDataset } from '../data/inspect.js'
import type { Args } from './args.js'
import { dataNotes, readData } from './data_source.js'
import { inspectFolder } from './inspect_requests.js'
import { interruptible } from './interrupt.js'
import { count, counted, day, percent, print, printJson, table } from './output.js'

export function run(args: Args): Promise<number | undefined> {
  const top = args.integer('top') ?? 10
  const path = args.positionals[0]!
  return interruptible(async signal => {
    if (statSync(path, { throwIfNoEntry: false })?.isDirectory()) {
      await inspectFolder(args, path, signal)
      return undefined
    }
    const dataset = await readData(args, signal, path)
    const report = inspectDataset(dataset, top)
    if (args.flag('json')) printJson(report)
    else printReport(report, dataNotes(dataset))
    return undefined
  })
}

function printReport(report: DatasetReport, notes: readonly string[]): void {
  const { length, time, rating, stats } = report
  print(
    `${report.name}: ${counted(report.users, 'user')}, ${counted(report.items, 'item')}, ${counted(report.actions, 'action')}`,
  )
  print(`density ${percent(report.density)}, popularity Gini ${report.popularityGini.toFixed(2)}`)
  print(
    `actions a user: ${length.min} to ${count(length.max)}, mean ${length.mean.toFixed(1)}, median ${length.median}`,
  )
  if (time)
    print(
      `time: ${day(time.first)} to ${day(time.last)} (${counted(Math.round(time.days), 'day')}), ` +
        `${percent(time.equalNeighbours)} of neighbours at the same second`,
    )
  else print('time: none in the file')
  if (rating) print(`rating: ${rating.min} to ${rating.max}, mean ${rating.mean.toFixed(2)}`)
  print(`\n${histogram(report.lengthHistogram)}`)
  if (report.popularItems.length > 0) {
    const rows = report.popularItems.map(({ id, count: n, share }) => [id, count(n), percent(share)])
    print(`\n${table(['popular item', 'actions', 'share'], rows)}`)
  }
  const all = [...notes]
  if (stats.outOfOrder > 0) all.push(`${counted(stats.outOfOrder, 'action')} out of the order of time in the file`)
  if (all.length > 0) print(`\n${all.map(note => `note: ${note}`).join('\n')}`)
}

/** Users by length, as bars of text. */
function histogram(bins: DatasetReport['lengthHistogram']): string {
  const most = Math.max(1, ...bins.map(bin => bin.users))
  const rows = bins.map(({ from, to, users }) => {
    const size = users === 0 ? 0 : Math.max(1, Math.round((40 * users) / most))
    return [from === to ? String(from) : `${from}-${to}`, count(users), '█'.repeat(size)]
  })
  return table(['actions', 'users', ''], rows, [2])
}
