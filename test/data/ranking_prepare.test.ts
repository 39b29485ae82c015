import { join } from 'node:path'
import { withDatabase } from '#lib/data/duckdb.js'
import type { RequestMapping } from '#lib/data/ranking/mapping.js'
import { prepareRequests } from '#lib/data/ranking/prepare.js'
import { Random } from '#lib/random.js'
import { expectError } from './files.js'
import { header, mappingOf, prepared as preparedIn } from './ranking_log.js'
import { plain, readAll, scratch } from './ranking_requests.js'

const { at, write } = scratch()
let made = 0
const prepared = (mapping: RequestMapping, out = at(`out${made++}`)) => preparedIn(mapping, out)

describe('events to requests', () => {
  it('gives the documented records', async () => {
    const path = write(
      'a.csv',
      [
        header,
        'r2,u,B,200,VIEW,,NL,en',
        'r1,u,A,100,VIEW,12,DE,de', // the file is not in order of time
        'r1,u,A,150,LIKE,,,',
        'r1,u,C,110,VIEW,,DE,de',
        'r1,u,C,260,LIKE,,,', // after request r2: not known to it
        'r1,u,A,150,LIKE,,,', // twice the same
        'r2,u,A,210,VIEW,45,NL,en', // liked before: taken
        'r3,u,B,300,LIKE,,,', // nothing is shown in r3
        'r4,u,B,400,VIEW,,,en',
        'q,v,C,100,VIEW,,,',
      ].join('\n'),
    )
    const reader = await prepared(mappingOf(path))
    expect(reader.manifest).toMatchObject({
      requests: 4,
      candidates: 6,
      counts: { rows: 10, duplicates: 1, withoutCandidates: 1, unknownRequests: 0 },
      sizes: { users: 2, items: 3, contextual: [2], series: [2] },
      schema: { actions: ['VIEW', 'LIKE', 'LONG'], values: ['watch'], contextual: ['country'], series: ['lang'] },
    })
    const [VIEW, LIKE, LONG] = [1, 2, 4]
    const [A, C, B] = [1, 2, 3] // by first appearance in time
    const none = { taken: 0, pending: 0, series: 0 }
    const de = { item: 1, series: 1, time: 100, actions: 0, taken: 0, pending: 0, request: -1, values: [Number.NaN] }
    const en = { ...de, item: 2, time: 200 }
    const [r1, q, r2, r4] = (await readAll(reader)).flatMap(plain)
    expect(r1).toEqual({
      ...{ request: 0, id: 'r1', user: 1, time: 100, contextual: [1], start: 0, supervisedFrom: 0 },
      history: [de],
      candidates: [
        { item: A, actions: VIEW | LIKE, taken: 0, values: [12] },
        { item: C, actions: VIEW | LIKE, taken: 0, values: [Number.NaN] },
      ],
    })
    expect(q).toMatchObject({ id: 'q', user: 2, time: 100, contextual: [0], history: [] })
    const a = { ...none, item: A, time: 100, actions: VIEW | LIKE, request: 0, values: [12] }
    const c = { ...none, item: C, time: 110, actions: VIEW, pending: LIKE, request: 0, values: [Number.NaN] }
    expect(r2).toEqual({
      ...{ request: 2, id: 'r2', user: 1, time: 200, contextual: [2], start: 0, supervisedFrom: 1 },
      history: [de, a, c, en],
      candidates: [
        { item: B, actions: VIEW, taken: 0, values: [Number.NaN] },
        { item: A, actions: VIEW | LONG, taken: VIEW | LIKE, values: [45] },
      ],
    })
    expect(r4!.supervisedFrom).toBe(4)
    expect(r4!.history.slice(4)).toEqual([
      { ...none, item: B, time: 200, actions: VIEW, request: 2, values: [Number.NaN] },
      { ...none, item: A, time: 210, actions: VIEW | LONG, taken: VIEW | LIKE, request: 2, values: [45] },
      { ...none, item: B, time: 300, actions: LIKE, taken: VIEW, request: -1, values: [Number.NaN] },
    ])
    expect(r4!.history[2]).toEqual({ ...c, actions: VIEW | LIKE, pending: 0 }) // by now it is known
  })

  it('knows at each request what a replay of the log knows', async () => {
    const random = new Random('replay')
    type Row = { req: string; user: string; item: string; time: number; event: string; watch: string }
    const rows: Row[] = Array.from({ length: 3000 }, () => {
      const [user, time] = [random.int(12), random.int(4000)]
      // Requests overlap and last long, so that many actions are pending.
      const req = `${user}.${Math.floor(time / 300) - random.int(2)}`
      const event = ['VIEW', 'VIEW', 'LIKE', 'SHARE'][random.int(4)]!
      const watch = random.float() < 0.3 ? String(random.int(60)) : ''
      return { req, user: `u${user}`, item: `i${random.int(40)}`, time, event, watch }
    })
    const path = write('replay.csv', [header, ...rows.map(r => [...Object.values(r), '', ''].join(','))].join('\n'))
    const maxHistory = 50
    const reader = await prepared(mappingOf(path, { maxHistory }))
    const names = await withDatabase(path, undefined, async database => {
      const file = join(reader.folder, 'vocabulary-items.parquet')
      return database.column(`SELECT id FROM read_parquet('${file}') ORDER BY number`)
    })
    const records = (await readAll(reader, 64)).flatMap(plain)
    expect(records.length).toBeGreaterThan(150)

    // The entries of a user, by definition: of each request and item, before and from its first view on.
    const bits = (r: Row) =>
      (r.event === 'VIEW' ? 1 : r.event === 'LIKE' ? 2 : 0) | (Number(r.watch || 0) >= 30 ? 4 : 0)
    const requestTime = new Map<string, number>()
    const groups = new Map<string, Row[]>()
    rows.forEach(r => {
      if (r.event === 'VIEW') requestTime.set(r.req, Math.min(requestTime.get(r.req) ?? 1e9, r.time))
      groups.set(`${r.req}|${r.item}`, [...(groups.get(`${r.req}|${r.item}`) ?? []), r])
    })
    const entries = [...groups.values()].flatMap(group => {
      const shown = Math.min(...group.filter(r => r.event === 'VIEW').map(r => r.time))
      const before = group.filter(r => r.time < shown)
      const from = group.filter(r => r.time >= shown)
      const loose = Number.isFinite(shown) ? before : group
      return [
        ...(loose.length > 0 ? [{ time: Math.min(...loose.map(r => r.time)), rows: loose, shown: false }] : []),
        ...(from.length > 0 && Number.isFinite(shown) ? [{ time: shown, rows: from, shown: true }] : []),
      ]
    })
    const byId = new Map(records.map(record => [record.id, record]))
    expect(byId.size).toBe(requestTime.size)
    expect(records.map(record => record.time)).toEqual([...requestTime.values()].sort((a, b) => a - b))
    let pending = 0
    for (const [id, time] of requestTime) {
      const record = byId.get(id)!
      const own = entries.filter(e => e.rows[0]!.user === `u${id.split('.')[0]}`)
      const past = own.filter(e => e.time < time).sort((x, y) => x.time - y.time)
      const kept = past.slice(-maxHistory)
      expect(record.start).toBe(past.length - kept.length)
      // Ties in time may stand in either order here: compare as multisets.
      const key = (x: object) => JSON.stringify(x)
      const known = kept.map(e => {
        const past = e.rows.filter(r => r.time < time).reduce((mask, r) => mask | bits(r), 0)
        const all = e.rows.reduce((mask, r) => mask | bits(r), 0)
        const request = e.shown ? byId.get(e.rows[0]!.req)!.request : -1
        return { item: e.rows[0]!.item, time: e.time, actions: past, pending: all & ~past, request }
      })
      const found = record.history.map(({ item, time, actions, pending, request }) => ({
        ...{ item: names[item - 1], time, actions, pending, request },
      }))
      // Where the cut falls among equal times, either may be kept.
      const cut = kept.length > 0 && past.length > kept.length ? kept[0]!.time : -1
      const sure = (list: { time: number }[]) =>
        list
          .filter(x => x.time > cut)
          .map(key)
          .sort()
      expect(sure(found)).toEqual(sure(known))
      expect(found.length).toBe(known.length)
      pending += known.filter(x => x.pending > 0).length
      const shown = own.filter(e => e.shown && e.rows[0]!.req === id)
      const label = (e: (typeof own)[number]) => {
        const item = e.rows[0]!.item
        const before = rows.filter(r => r.user === e.rows[0]!.user && r.item === item && r.time < e.time)
        const mask = (list: Row[]) => list.reduce((sum, r) => sum | bits(r), 0)
        return { item, actions: mask(e.rows), taken: mask(before) }
      }
      const labels = record.candidates.map(({ item, actions, taken }) => ({ item: names[item - 1], actions, taken }))
      expect(labels.map(key).sort()).toEqual(shown.map(e => key(label(e))).sort())
    }
    expect(pending).toBeGreaterThan(20)
  })

  it('is the same from CSV, Parquet and JSON lines, and from a request a user and time', async () => {
    const rows = Array.from({ length: 50 }, (_, k) => ({
      u: `u${k % 3}`,
      i: `9007199254740993${k % 7}`,
      t: 10 * (k >> 1),
    }))
    const csv = write('f.csv', `u,i,t\n${rows.map(r => Object.values(r).join(',')).join('\n')}\n`)
    const jsonl = write('f.jsonl', rows.map(r => JSON.stringify(r)).join('\n'))
    const parquet = at('f.parquet')
    await withDatabase(csv, undefined, database =>
      database.run(`COPY (SELECT u, i::HUGEINT::VARCHAR AS i, t::BIGINT AS t FROM
        read_csv('${csv}', header=true, auto_detect=false, columns={u:'VARCHAR',i:'VARCHAR',t:'VARCHAR'})) TO '${parquet}'`),
    )
    const all = []
    for (const path of [csv, parquet, jsonl]) {
      const source = { path, user: 'u', item: 'i', time: 't', actions: { SEEN: true } }
      all.push((await readAll(await prepared({ name: 'f', sources: [source], tasks: ['seen = SEEN'] }))).flatMap(plain))
    }
    expect(all[0]!.length).toBe(50)
    expect(all[0]![0]).toMatchObject({ id: 'u0@0', time: 0 })
    expect(all[1]).toEqual(all[0])
    expect(all[2]).toEqual(all[0])
  })

  it('joins late labels by request id and counts those of unknown requests', async () => {
    const shown = write('shown.csv', 'req,user,item,time\nr1,u,A,1000\nr1,u,B,1000\nr2,u,C,2000\n')
    const late = write('late.csv', 'req,item,time\nr1,B,1500\nr2,C,99000\nr9,A,1500\n')
    const sources: RequestMapping['sources'] = [
      {
        path: shown,
        user: 'user',
        item: 'item',
        time: 'time',
        request: 'req',
        timeUnit: 'ms',
        actions: { VIEW: true },
      },
      {
        path: late,
        item: 'item',
        time: 'time',
        request: 'req',
        timeUnit: 'ms',
        impression: false,
        actions: { BUY: true },
      },
    ]
    const reader = await prepared({ name: 'late', sources, tasks: ['buy = BUY'] })
    expect(reader.manifest.counts).toMatchObject({ unknownRequests: 1, fractions: 2 })
    const records = (await readAll(reader)).flatMap(plain)
    expect(records.map(r => r.candidates.map(c => c.actions))).toEqual([[1, 3], [3]])
    expect(records[1]!.history.map(h => h.actions)).toEqual([1, 3])
    const twoUsers = write('two.csv', 'req,user,item,time\nr1,u,A,1\nr1,v,A,1\n')
    const ambiguous = [{ ...sources[0]!, path: twoUsers }, sources[1]!]
    await expectError(prepareRequests({ name: 'x', sources: ambiguous, tasks: ['buy = BUY'] }, { out: at('no') }), [
      "'r1'",
      '2 users',
    ])
  })

  it('keeps request ids that look like those of requests without one', async () => {
    const path = write('at.csv', 'req,user,item,time\n@5,u,A,5\n,u,B,5\n@5,v,C,5\n')
    const source = { path, user: 'user', item: 'item', time: 'time', request: 'req', actions: { VIEW: true } }
    const reader = await prepared({ name: 'at', sources: [source], tasks: ['view = VIEW'] })
    const ids = (await readAll(reader)).flatMap(plain).map(({ id, candidates }) => [id, candidates.length])
    expect(ids).toEqual([
      ['@5', 1],
      ['u@5', 1],
      ['@5', 1],
    ])
  })

  it('bounds the vocabulary as asked', async () => {
    const path = write('many.csv', `u,i,t\n${[1, 2, 3, 2, 3].map((i, k) => `u,i${i},${k}`).join('\n')}\n`)
    const mapping = {
      name: 'm',
      sources: [{ path, user: 'u', item: 'i', time: 't', actions: { S: true } }],
      tasks: ['s = S'],
      maxItems: 2,
    }
    await expectError(prepareRequests(mapping, { out: at('bound') }), ['3 items', 'maxItems 2'])
    const reader = await prepared({ ...mapping, overflow: 'unknown' })
    expect(reader.manifest).toMatchObject({ counts: { overflow: 2 }, sizes: { items: 2 } })
    const items = (await readAll(reader)).flatMap(plain).flatMap(r => r.candidates.map(c => c.item))
    expect(items).toEqual([1, 2, 0, 2, 0])
  })
})
