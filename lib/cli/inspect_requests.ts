import { inspectRequests, type RequestReport } from '../data/ranking/inspect.js'
import { RequestReader } from '../data/ranking/reader.js'
import type { Args } from './args.js'
import { countNotes } from './data_prepare.js'
import { compact, count, counted, day, percent, print, printJson, table } from './output.js'
import { Progress } from './progress.js'

/** `data inspect` of a folder that `data prepare` wrote. */
export async function inspectFolder(args: Args, folder: string, signal: AbortSignal): Promise<void> {
  const reader = await RequestReader.open(folder)
  const progress = new Progress(`reading ${folder}`)
  let report: RequestReport
  try {
    report = await inspectRequests(reader, { signal, onProgress: (done, total) => progress.update(done, total) })
  } finally {
    progress.clear()
  }
  if (args.flag('json')) printJson(report)
  else printReport(report)
}

function printReport(report: RequestReport): void {
  const { candidatesPerRequest: each, bytes, time } = report
  print(
    `${report.name}: ${counted(report.requests, 'request')}, ${counted(report.candidates, 'candidate')}, ` +
      `${counted(report.users, 'user')}, ${counted(report.items, 'item')}`,
  )
  if (time) print(`time: ${day(time.first)} to ${day(time.last)} (${counted(Math.round(time.days), 'day')})`)
  print(`candidates a request: ${each.min} to ${each.max}, mean ${each.mean.toFixed(2)} (the dedup factor)`)
  print(`history: ${count(report.historyEntries)} entries, ${count(report.pending)} with actions not known yet`)
  print(
    `bytes: ${compact(bytes.records)} of numbers, ${compact(bytes.impressionRows)} as impression rows ` +
      `(${(bytes.impressionRows / bytes.records).toFixed(2)} times); ${compact(bytes.stored)} stored`,
  )
  const most = Math.max(1, ...report.historyHistogram.map(bin => bin.requests))
  const bins = report.historyHistogram.map(({ from, to, requests }) => [
    from === to || to === 0 ? String(from) : `${from}-${to}`,
    count(requests),
    '█'.repeat(Math.max(1, Math.round((40 * requests) / most))),
  ])
  print(`\n${table(['history', 'requests', ''], bins, [2])}`)
  const rates = report.actions.map(({ name, candidates, history }) => [name, percent(candidates), percent(history)])
  print(`\n${table(['action', 'of candidates', 'of history'], rates)}`)
  const rows = report.tasks.map(({ name, kind, labelled, rate, lastRate }) => [
    ...[name, kind, count(labelled), rate.toFixed(4), lastRate.toFixed(4)],
  ])
  print(`\n${table(['task', 'kind', 'labelled', 'mean label', 'of the last 20 %'], rows, [0, 1])}`)
  const notes = countNotes(report.counts)
  if (notes.length > 0) print(`\n${notes.map(note => `note: ${note}`).join('\n')}`)
}
