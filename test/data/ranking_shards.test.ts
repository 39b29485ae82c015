import { existsSync, readdirSync, readFileSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { withDatabase } from '#lib/data/duckdb.js'
import { type RequestMapping, readMapping } from '#lib/data/ranking/mapping.js'
import { prepareRequests } from '#lib/data/ranking/prepare.js'
import { RequestReader } from '#lib/data/ranking/reader.js'
import { Random } from '#lib/random.js'
import { expectError } from './files.js'
import { header, mappingOf, prepared as preparedIn } from './ranking_log.js'
import { plain, readAll, scratch } from './ranking_requests.js'

const { at, write } = scratch()
let made = 0
const prepared = (mapping: RequestMapping, out = at(`out${made++}`)) => preparedIn(mapping, out)

describe('bad input', () => {
  const fails = async (text: string, parts: string[], change: (m: RequestMapping) => RequestMapping = m => m) => {
    const path = write(`bad${made++}.csv`, text)
    const out = at(`bad-out${made}`)
    await expectError(prepareRequests(change(mappingOf(path)), { out }), parts)
    expect(existsSync(out)).toBe(false)
    expect(readdirSync(at('.')).filter(name => name.endsWith('.tmp'))).toEqual([])
  }
  it('names file, line and what was expected', async () => {
    await fails(`${header}\nr,,A,1,VIEW,,,`, [':2: ', 'a user id'])
    await fails(`${header}\n\nr,u,A,1,VIEW,,,\nr,u,,1,VIEW,,,`, [':4: ', 'an item id'])
    await fails(`${header}\nr,u,A,noon,VIEW,,,`, [':2: ', 'a time', '"noon"'])
    await fails(`${header}\nr,u,A,1,VIEW,long,,`, [':2: ', 'a number'])
    await fails(`${header}\nr,u,A,1600000000,VIEW,,,\nr,u,A,1600000000000,VIEW,,,`, [':3: ', 'one unit'])
    await fails(`${header}\nr,u,A,1600000000000,VIEW,,,`, [':2: ', 'timeUnit'])
    const inMs = (m: RequestMapping) => ({ ...m, sources: m.sources.map(s => ({ ...s, timeUnit: 'ms' as const })) })
    await fails(`${header}\nr,u,A,1600000000000,VIEW,,,\nr,u,A,1600000000,VIEW,,,`, [':3: ', 'one unit'], inMs)
    await fails(`${header}\nr,u,A,1,LIKE,,,`, ['no row is an impression'])
    const second = write('in-ms.csv', `${header}\nr,u,B,1600000000000,VIEW,,,`)
    const twoFiles = (m: RequestMapping) => ({
      ...m,
      sources: m.sources.map(s => ({ ...s, path: [s.path as string, second] })),
    })
    await fails(`${header}\nr,u,A,1600000000,VIEW,,,`, ['in-ms.csv:2: ', 'one unit', '"1600000000000"'], twoFiles)
    await fails(`${header}\nr,u,A,1,VIEW`, [':2: ', 'columns'])
    await fails(header, ['no rows'])
    await fails('req,user,thing,time,event,watch,country,lang\nr,u,A,1,VIEW,,,', ['no column "item"', '"thing"'])
  })
  it('names what is wrong in a mapping file', async () => {
    const source = { path: 'x.csv', user: 'u', item: 'i', time: 't', actions: { LIKE: true } }
    const good = { name: 'n', sources: [source], tasks: ['like = LIKE'] }
    const expectMapping = (value: unknown, parts: string[]) => {
      const path = write(`map${made++}.json`, typeof value === 'string' ? value : JSON.stringify(value))
      return expectError(readMapping(path), [path, ...parts])
    }
    const path = write('good.json', JSON.stringify(good))
    expect((await readMapping(path)).sources[0]!.path).toEqual([at('x.csv')])
    await expectMapping('{"name":', ['not a JSON document'])
    await expectMapping([], ['the mapping must be an object'])
    await expectMapping({ ...good, source: [] }, ['unknown field "source"'])
    await expectMapping({ ...good, sources: [{ ...source, item: undefined }] }, ['sources[0].item', 'a column'])
    await expectMapping({ ...good, sources: [{ ...source, user: undefined }] }, ['sources[0].user'])
    await expectMapping({ ...good, sources: [{ ...source, timeUnit: 'min' }] }, ['timeUnit', 's, ms or us'])
    const rule = (LIKE: unknown) => ({ ...good, sources: [{ ...source, actions: { LIKE } }] })
    await expectMapping(rule({ column: 'x' }), ['actions.LIKE', 'either equals, or atLeast'])
    await expectMapping(rule({ column: 'x', atLeast: '3' }), ['actions.LIKE.atLeast', 'a number'])
    await expectMapping({ ...good, tasks: ['like = HATE'] }, ['tasks[0]', 'no action "HATE"', '"LIKE"'])
    await expectMapping({ ...good, maxHistory: 0 }, ['maxHistory', 'positive integer'])
    const many = Object.fromEntries(Array.from({ length: 32 }, (_, k) => [`A${k}`, true]))
    await expectMapping({ ...good, sources: [{ ...source, actions: { LIKE: true, ...many } }] }, ['33 actions', '31'])
    await expectError(readMapping(at('absent.json')), ['no such file'])
  })
  it('keeps what is there, and leaves nothing when it is aborted', async () => {
    const path = write('keep.csv', `${header}\nr,u,A,1,VIEW,,,\n`)
    const reader = await prepared(mappingOf(path))
    await expectError(prepareRequests(mappingOf(path), { out: reader.folder }), ['exists'])
    await prepareRequests(mappingOf(path), { out: reader.folder, replace: true })
    await expectError(prepareRequests(mappingOf(path), { out: at('.'), replace: true }), ['other files'])
    const signal = AbortSignal.abort()
    await expectError(prepareRequests(mappingOf(path), { out: at('aborted'), signal }), ['aborted'], 'ERR_HSTU_ABORTED')
    expect(readdirSync(at('.')).filter(name => /aborted|tmp/.test(name))).toEqual([])
  })
})

describe('reading', () => {
  const log = () => {
    const random = new Random('reading')
    const rows = Array.from(
      { length: 9000 },
      (_, k) => `r${k >> 1},u${random.int(50)},i${random.int(99)},${k >> 1},VIEW,,,`,
    )
    return write('long.csv', [header, ...rows].join('\n'))
  }
  it('cuts batches of any size, from any request on, with the same records', async () => {
    const reader = await prepared(mappingOf(log(), { maxHistory: 20 }))
    const all = (await readAll(reader, 5000)).flatMap(plain)
    expect(all.length).toBe(reader.manifest.requests)
    for (const size of [1000, 2048, 777]) {
      const batches = await readAll(reader, size)
      expect(batches.slice(0, -1).every(batch => batch.requests.length === size)).toBe(true)
      for (const { candidates } of batches)
        for (let m = 0; m < candidates.items.length; m++) {
          const b = Number(candidates.requestIndex[m]!)
          expect(candidates.offsets[b]! <= BigInt(m) && BigInt(m) < candidates.offsets[b + 1]!).toBe(true)
        }
      expect(batches.flatMap(plain)).toEqual(all)
    }
    const part = []
    for await (const batch of reader.batches({ batchSize: 300, first: 2500, end: 4100 })) part.push(...plain(batch))
    expect(part).toEqual(all.slice(2500, 4100))
    for await (const batch of reader.batches({ batchSize: 10 })) {
      expect(batch.requests[0]).toBe(0)
      break // and the thread ends, or this test would not
    }
    const signal = AbortSignal.timeout(0)
    await new Promise(resolve => setTimeout(resolve, 5))
    await expectError(reader.batches({ batchSize: 10, signal }).next(), ['aborted'], 'ERR_HSTU_ABORTED')
    await expectError(reader.batches({ batchSize: 0 }).next(), ['batchSize'], 'ERR_HSTU_INVALID_ARGUMENT')
  })
  it('refuses folders and shards that are not whole', async () => {
    const path = write('whole.csv', `${header}\nr,u,A,1,VIEW,,,\nr2,u,A,2,VIEW,,,\n`)
    const folder = (await prepared(mappingOf(path))).folder
    const manifest = join(folder, 'manifest.json')
    const text = readFileSync(manifest, 'utf8')
    const shard = join(folder, 'requests-00000.parquet')
    const bytes = readFileSync(shard)
    await expectError(RequestReader.open(at('nowhere')), ['manifest.json', 'hstu data prepare'])
    writeFileSync(manifest, text.replace('"version": 1', '"version": 9'))
    await expectError(RequestReader.open(folder), ['version 9'])
    writeFileSync(manifest, text)
    truncateSync(shard, bytes.length - 10)
    await expectError(RequestReader.open(folder), ['requests-00000.parquet', 'cut off'])
    // Written by something that did not finish, with a manifest that agrees.
    writeFileSync(manifest, text.replace(`"bytes": ${bytes.length}`, `"bytes": ${bytes.length - 10}`))
    await expectError(readAll(await RequestReader.open(folder)), ['requests-00000.parquet', 'cannot be read'])
    // As long as it should be, but not what was written.
    writeFileSync(manifest, text)
    writeFileSync(shard, Buffer.concat([bytes.subarray(0, 4), Buffer.alloc(bytes.length - 4, 7)]))
    await expectError(readAll(await RequestReader.open(folder)), ['requests-00000.parquet', 'cannot be read'])
    const rewrite = async (select: string, parts: string[]) => {
      writeFileSync(shard, bytes)
      await withDatabase(shard, undefined, async database => {
        await database.run(`CREATE TABLE t AS SELECT * FROM read_parquet('${shard}')`)
        await database.run(`COPY (SELECT ${select} FROM t) TO '${shard}'`)
      })
      const size = readFileSync(shard).length
      writeFileSync(manifest, text.replace(`"bytes": ${bytes.length}`, `"bytes": ${size}`))
      await expectError(readAll(await RequestReader.open(folder)), ['requests-00000.parquet', ...parts])
    }
    await rewrite('* REPLACE (10 - time AS time)', ['record 1', 'before that of the record in front'])
    await rewrite(
      '* REPLACE ([]::BIGINT[] AS candidate_item, []::INTEGER[] AS candidate_action, []::INTEGER[] AS candidate_taken, []::FLOAT[] AS candidate_value_watch)',
      ['record 0', 'no candidates'],
    )
    await rewrite('* REPLACE ([1]::INTEGER[] AS history_action)', ['record 0', 'history_action has 1 entries'])
    await rewrite('* REPLACE (NULL::BIGINT AS user)', ['record 0', 'user is missing'])
    await rewrite('* REPLACE (request + 5 AS request)', ['ends after record'])
    await rewrite('* EXCLUDE (candidate_taken)', ['expected a column candidate_taken'])
    await rewrite('* REPLACE (list_transform(history_time, lambda t: t + 5) AS history_time)', [
      'history_time is not in order',
    ])
  })
})
