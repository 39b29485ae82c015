// From a log to token sequences, against a reading of the definition that shares nothing with the SQL: series compressed to their
// changes, merged by time with auxiliary entries first, actions of one item OR-ed, contextual tokens in front.
import type { RequestMapping } from '#lib/data/ranking/mapping.js'
import { prepareRequests } from '#lib/data/ranking/prepare.js'
import { RequestReader } from '#lib/data/ranking/reader.js'
import { type ActionFusion, tokenLayout } from '#lib/data/ranking/sequence.js'
import { Random } from '#lib/random.js'
import { plain, readAll, scratch } from './ranking_requests.js'

const { at, write } = scratch()

interface Row {
  req: string
  user: string
  item: string
  time: number
  kind: 'view' | 'like' | 'save'
  city: string
  lang: string
  country: string
}

/** Requests of one time, users who come back within the second, features that flip and are sometimes absent; in no order. */
function makeLog(random: Random): Row[] {
  const rows: Row[] = []
  for (let r = 0; r < 400; r++) {
    const user = `u${random.int(7)}`
    const time = 1000 + random.int(300)
    const country = random.int(4) === 0 ? '' : `c${random.int(3)}`
    const items = random.shuffle(Array.from({ length: 12 }, (_, i) => `i${i}`)).slice(0, 1 + random.int(4))
    for (const item of items) {
      const feature = (names: number) => (random.int(5) === 0 ? '' : `f${random.int(names)}`)
      const common = { req: `r${r}`, user, item, country }
      rows.push({ ...common, time, kind: 'view', city: feature(2), lang: feature(3) })
      for (const kind of ['like', 'save'] as const)
        if (random.int(3) === 0) rows.push({ ...common, time: time + random.int(40), kind, city: '', lang: '' })
    }
  }
  return random.shuffle(rows)
}

const BITS = { view: 1, like: 2, save: 4 }

/** Numbers by first appearance in time. */
function numbers(rows: readonly Row[], of: (row: Row) => string): Map<string, number> {
  const ids = new Map<string, number>()
  for (const row of [...rows].sort((a, b) => a.time - b.time))
    if (of(row) !== '' && !ids.has(of(row))) ids.set(of(row), ids.size + 1)
  return ids
}

/** [series, number, time, known actions, pending actions] of every entry that the request sees. */
function historyOf(all: readonly Row[], ids: Record<'item' | 'city' | 'lang', Map<string, number>>, at: Row) {
  const rows = all.map((row, n) => ({ ...row, n })).filter(row => row.user === at.user)
  type Entry = { series: number; value: number; time: number; n: number; events: Row[] }
  const entries: Entry[] = []
  const groups = new Map<string, Entry>()
  const inTime = [...rows].sort((a, b) => a.time - b.time || a.n - b.n)
  for (const row of inTime) {
    const key = `${row.req} ${row.item}`
    const entry = groups.get(key)
    if (entry) {
      entry.events.push(row)
      entry.n = Math.min(entry.n, row.n)
      continue
    }
    const made = { series: 0, value: ids.item.get(row.item)!, time: row.time, n: row.n, events: [row as Row] }
    groups.set(key, made)
    entries.push(made)
  }
  ;(['city', 'lang'] as const).forEach((name, s) => {
    let before = ''
    for (const row of inTime) {
      if (row[name] === '' || row[name] === before) continue
      before = row[name]
      entries.push({ series: s + 1, value: ids[name].get(row[name])!, time: row.time, n: row.n, events: [] })
    }
  })
  const order = (e: Entry) => [e.time, Number(e.series === 0), e.n, e.series] as const
  entries.sort((a, b) => {
    const [x, y] = [order(a), order(b)]
    const k = x.findIndex((value, i) => value !== y[i])
    return k < 0 ? 0 : x[k]! - y[k]!
  })
  const bits = (events: readonly Row[]) => events.reduce((mask, row) => mask | BITS[row.kind], 0)
  return entries
    .filter(e => e.time < at.time || (e.series > 0 && e.time === at.time))
    .map(e => {
      const known = bits(e.events.filter(row => row.time < at.time))
      return [e.series, e.value, e.time, known, bits(e.events) & ~known]
    })
}

describe('sequentialisation', () => {
  const mappingOf = (path: string, maxHistory?: number): RequestMapping => ({
    name: 'sequence',
    sources: [
      {
        ...{ path, user: 'user', item: 'item', time: 'time', request: 'req' },
        impression: { column: 'kind', equals: 'view' },
        actions: Object.fromEntries(['view', 'like', 'save'].map(kind => [kind, { column: 'kind', equals: kind }])),
        contextual: { country: 'country' },
        series: { city: 'city', lang: 'lang' },
      },
    ],
    tasks: ['like = like'],
    ...(maxHistory === undefined ? {} : { maxHistory }),
  })

  it.each([undefined, 16])('gives the series of the definition, with maxHistory %s', async maxHistory => {
    const rows = makeLog(new Random('sequence'))
    const columns = ['req', 'user', 'item', 'time', 'kind', 'city', 'lang', 'country'] as const
    const path = write(
      'log.csv',
      [columns.join(','), ...rows.map(row => columns.map(c => row[c]).join(','))].join('\n'),
    )
    const out = at(`out${maxHistory}`)
    await prepareRequests(mappingOf(path, maxHistory), { out })
    const batches = await readAll(await RequestReader.open(out), 37)
    // Times tie, and ids of one second are numbered by row: as `numbers` does, for its sort is stable.
    const ids = {
      item: numbers(rows, row => row.item),
      city: numbers(rows, row => row.city),
      lang: numbers(rows, row => row.lang),
    }
    const countries = numbers(rows, row => row.country)
    let [entries, auxiliary, ties, pending] = [0, 0, 0, 0]
    for (const record of batches.flatMap(plain)) {
      const own = rows.filter(row => row.req === record.id)
      const request = own.find(row => row.kind === 'view')!
      const history = historyOf(rows, ids, request)
      const kept = history.slice(-(maxHistory ?? 1024))
      expect(record.history.map(h => [h.series, h.item, h.time, h.actions, h.pending])).toEqual(kept)
      expect(record.start).toBe(history.length - kept.length)
      expect(record.contextual).toEqual([countries.get(request.country) ?? 0])
      const bits = (item: string) =>
        own.filter(row => row.item === item).reduce((mask, row) => mask | BITS[row.kind], 0)
      const shown = own.filter(row => row.kind === 'view').map(row => [ids.item.get(row.item), bits(row.item)])
      const byItem = (pairs: unknown[][]) => pairs.sort((a, b) => Number(a[0]) - Number(b[0]))
      expect(byItem(record.candidates.map(c => [c.item, c.actions]))).toEqual(byItem(shown))
      entries += kept.length
      auxiliary += kept.filter(([series]) => series! > 0).length
      ties += kept.filter(([series, , time], k) => series === 0 && k > 0 && kept[k - 1]![2] === time).length
      pending += kept.filter(([, , , , late]) => late! > 0).length
    }
    expect(entries).toBeGreaterThan(5000)
    for (const share of [auxiliary, ties]) expect(share).toBeGreaterThan(entries / 20)
    expect(pending).toBeGreaterThan(100)
    for (const batch of batches)
      for (const fusion of ['interleave', 'add'] as ActionFusion[]) {
        const layout = tokenLayout(batch, fusion)
        const tokens = plain(batch).flatMap(({ time, history, candidates }) => [
          time, // the contextual token
          ...history.flatMap(h => (fusion === 'interleave' && h.series === 0 ? [h.time, h.time] : [h.time])),
          ...candidates.map(() => time),
        ])
        expect(Array.from(layout.times, Number)).toEqual(tokens)
      }
  })
})
