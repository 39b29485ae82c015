import { mkdirSync } from 'node:fs'
import { dirname } from 'node:path'
import { gzipSync } from 'node:zlib'
import { DuckDBInstance } from '@duckdb/node-api'
import { describe, expect, it, vi } from 'vitest'
import { type LoadProgress, loadDataset } from '#lib/data/load.js'
import { Random } from '#lib/random.js'
import { expectError, histories, temporaryFiles } from './files.js'

const write = temporaryFiles()
const inter = 'user_id:token\titem_id:token\trating:float\ttimestamp:float\n'

describe('formats', () => {
  const expected = { '7': ['a', 'b', 'c'], '8': ['c', 'a', 'b'] }

  it('RecBole .inter, with times and without', async () => {
    const path = write(
      'x.inter',
      `${inter}7\tb\t4\t20\n8\tc\t1\t5\n7\ta\t3.5\t10.0\n7\tc\t5\t30\n8\ta\t2\t6\n8\tb\t2\t7\n`,
    )
    const data = await loadDataset(path)
    expect(data.name).toBe('x')
    expect(histories(data)).toEqual(expected)
    expect([...data.times!]).toEqual([10n, 20n, 30n, 5n, 6n, 7n])
    expect([...data.ratings!]).toEqual([3.5, 4, 5, 1, 2, 2])
    // Numbers go by first appearance in the file, not by time.
    expect(data.itemIds).toEqual(['', 'b', 'c', 'a'])
    expect(data.stats).toEqual({
      rows: 6,
      skippedUsers: 0,
      skippedActions: 0,
      outOfOrder: 1,
      minActions: 3,
      warnings: [],
    })
    const untimed = await loadDataset(write('y.inter', 'item_id:token\tuser_id:token\nb\t7\na\t7\nc\t7\n'))
    expect(histories(untimed)).toEqual({ '7': ['b', 'a', 'c'] })
    expect([untimed.times, untimed.ratings]).toEqual([null, null])
  })

  it('MovieLens ratings.dat and ratings.csv, Amazon ratings_*.csv', async () => {
    const rows = [
      ['7', 'b', '4', '20'],
      ['8', 'c', '1', '5'],
      ['7', 'a', '3', '10'],
      ['7', 'c', '5', '30'],
      ['8', 'a', '2', '6'],
      ['8', 'b', '2', '7'],
    ]
    const text = (separator: string) => rows.map(row => row.join(separator)).join('\n')
    const dat = await loadDataset(write('ml/ratings.dat', text('::')))
    const csv = await loadDataset(
      write('ml/ratings.csv', `userId,movieId,rating,timestamp\r\n${text(',').replaceAll('\n', '\r\n')}\r\n`),
    )
    const amazon = await loadDataset(write('ratings_Books.csv', text(',')))
    for (const data of [dat, csv, amazon]) {
      expect(histories(data)).toEqual(expected)
      expect([...data.ratings!]).toEqual([3, 4, 5, 1, 2, 2])
      expect([...data.items]).toEqual([...dat.items])
    }
    // The first line tells where the name does not.
    expect(histories(await loadDataset(write('one.txt', text('::'))))).toEqual(expected)
  })

  it('sequence files keep their order, with a times file or without', async () => {
    const path = write('s.txt', '\ufeff7 a b c\n\n9 a\n8\tc a b \r\n')
    const data = await loadDataset(path)
    expect(histories(data)).toEqual(expected)
    expect(data.times).toBeNull()
    expect(data.stats).toMatchObject({ rows: 7, skippedUsers: 1, skippedActions: 1 })
    const timed = await loadDataset(path, { times: write('s_time.txt', '7 3 1 2\n9 5\n8 1 1 2.5\n'), minActions: 1 })
    expect(histories(timed)).toEqual({ ...expected, '9': ['a'] })
    expect([...timed.times!]).toEqual([3n, 1n, 2n, 5n, 1n, 1n, 2n])
    expect(timed.stats.outOfOrder).toBe(1)
    expect(timed.stats.warnings.join()).toMatch(/earlier than the one before.*fraction/)
  })

  it('CSV by mapping: names, numbers, quotes, other delimiters, names with wildcards', async () => {
    const text = '"when","the user",item\n20,7,"b"\n5,8,c\n10,7,a\n30,7,c\n6,8,a\n7,8,b\n'
    const mapping = { user: 'the user', item: 'item', time: 'when' }
    const data = await loadDataset(write('m.csv', text), { mapping })
    expect(histories(data)).toEqual(expected)
    write('ma.csv', 'other')
    expect(histories(await loadDataset(write("m?*[a]'.csv", text), { mapping }))).toEqual(expected)
    const bare = text.split('\n').slice(1).join('\n')
    expect(histories(await loadDataset(write('m2.csv', bare), { mapping: { user: 1, item: 2, time: 0 } }))).toEqual(
      expected,
    )
    const piped = write('m3.log', bare.replaceAll(',', '|'))
    const options = { mapping: { user: 1, item: 2, time: 0, delimiter: '|' } }
    expect(histories(await loadDataset(piped, options))).toEqual(expected)
    const tabbed = write('u.data', bare.replaceAll(',', '\t'))
    expect(histories(await loadDataset(tabbed, { mapping: { user: 1, item: 2, time: 0 } }))).toEqual(expected)
  })

  it('JSON lines by mapping', async () => {
    const big = '9223372036854775807'
    const path = write(
      'm.jsonl',
      `{"u/1":${big},"i":"a","t":3}\n\n{"u/1":${big},"i":12,"t":1.5}\n{"i":"c","u/1":${big},"t":2}\n`,
    )
    const data = await loadDataset(path, { mapping: { user: 'u/1', item: 'i', time: 't' } })
    expect(histories(data)).toEqual({ [big]: ['12', 'c', 'a'] })
    expect([...data.times!]).toEqual([1n, 2n, 3n])
    expect(data.stats.warnings.join()).toContain('1 times have a fraction')
  })

  it('Parquet by mapping, with 64-bit ids and timestamps', async () => {
    const path = write('m.parquet', '')
    const connection = await (await DuckDBInstance.create()).connect()
    await connection.run(`COPY (SELECT * FROM (VALUES (9007199254740993, 'a', TIMESTAMP '1970-01-01 00:00:09', 1.5),
      (9007199254740993, 'b', TIMESTAMP '1970-01-01 00:00:05', 2), (9007199254740993, 'c', TIMESTAMP '1970-01-01 00:00:07', 3))
      v(u, i, t, r)) TO '${path}' (FORMAT parquet)`)
    const data = await loadDataset(path, { mapping: { user: 'u', item: 'i', time: 't', rating: 'r' } })
    expect(histories(data)).toEqual({ '9007199254740993': ['b', 'c', 'a'] })
    expect([...data.times!]).toEqual([5n, 7n, 9n])
    expect([...data.ratings!]).toEqual([2, 3, 1.5])
    await expectError(loadDataset(path, { mapping: { user: 'u', item: 'x' } }), ['no column "x"', '"u", "i", "t", "r"'])
    await expectError(loadDataset(path, { mapping: { user: 'u', item: 'r', time: 'i' } }), [
      'row 1',
      'a time in seconds',
      '"a"',
    ])
    await expectError(loadDataset(path), ['needs options.mapping'])
  })

  it('compressed tables', async () => {
    const text = `${inter}7\ta\t4\t1\n7\tb\t4\t2\n7\tc\t4\t3\n`
    const data = await loadDataset(write('z.inter.gz', gzipSync(text)))
    expect(data.name).toBe('z')
    expect(histories(data)).toEqual({ '7': ['a', 'b', 'c'] })
    const packed = write('z.csv.zst', '')
    const connection = await (await DuckDBInstance.create()).connect()
    await connection.run(
      `COPY (SELECT 7 AS u, unnest(['a', 'b', 'c']) AS i) TO '${packed}' (FORMAT csv, COMPRESSION zstd)`,
    )
    const zstd = await loadDataset(packed, { mapping: { user: 'u', item: 'i' } })
    expect(histories(zstd)).toEqual({ '7': ['a', 'b', 'c'] })
  })
})

describe('exactness', () => {
  it('keeps ids apart that differ beyond 2^53', async () => {
    const rows = ['9007199254740992', '9007199254740993'].flatMap(user =>
      ['-9223372036854775807', '-9223372036854775808', '007', '7'].map((item, k) => `${user},${item},1,${k}`),
    )
    const data = await loadDataset(write('ratings_big.csv', rows.join('\n')))
    expect(data.userIds).toEqual(['9007199254740992', '9007199254740993'])
    expect(data.itemIds).toEqual(['', '-9223372036854775807', '-9223372036854775808', '007', '7'])
  })

  it('keeps the order of the file among equal times, on many rows', async () => {
    const random = new Random('ties')
    const rows = Array.from({ length: 200_000 }, (_, k) => ({ user: random.int(5000), item: k, time: random.int(4) }))
    const text = rows.map(row => `${row.user},i${row.item},5,${row.time}`).join('\n')
    const path = write('ratings_ties.csv', text)
    const start = performance.now()
    const data = await loadDataset(path)
    expect(performance.now() - start).toBeLessThan(8000)
    const perUser = new Map<number, typeof rows>()
    for (const row of rows) perUser.set(row.user, [...(perUser.get(row.user) ?? []), row])
    const wanted = [...perUser].map(([user, list]) => [
      String(user),
      list.sort((a, b) => a.time - b.time).map(row => `i${row.item}`),
    ])
    expect(histories(data)).toEqual(Object.fromEntries(wanted))
    expect(data.userIds).toEqual([...perUser.keys()].map(String))
  })

  it('skips and counts short users; their items get no number', async () => {
    const path = write('ratings_short.csv', 'a,x,1,1\nb,y,1,1\nb,z,1,2\nb,y,1,3\na,w,1,2')
    const data = await loadDataset(path)
    expect(data.userIds).toEqual(['b'])
    expect(data.itemIds).toEqual(['', 'y', 'z'])
    expect(data.stats).toMatchObject({ rows: 5, skippedUsers: 1, skippedActions: 2 })
    expect((await loadDataset(path, { minActions: 2 })).numUsers).toBe(2)
    await expectError(loadDataset(path, { minActions: 4 }), [path, 'no user has 4 actions'])
    await expectError(loadDataset(path, { minActions: 0 }), ['minActions'], 'ERR_HSTU_INVALID_ARGUMENT')
  })

  it('warns of milliseconds and of fractions, and guesses neither', async () => {
    const data = await loadDataset(
      write('ratings_ms.csv', 'a,x,1,1400000000000\na,y,1,1400000000001.25\na,z,1,1400000000002'),
    )
    expect([...data.times!]).toEqual([1400000000000n, 1400000000001n, 1400000000002n])
    expect(data.stats.warnings.join()).toMatch(/1 times have a fraction.*milliseconds/)
  })

  it('reports progress and stops when told to', async () => {
    const path = write('ratings_p.csv', 'a,x,1,1\na,y,1,2\na,z,1,3')
    const seen: LoadProgress[] = []
    await loadDataset(path, { onProgress: progress => seen.push(progress) })
    expect(seen.map(progress => progress.phase)).toEqual(['read', 'sort', 'fetch'])
    expect(seen.at(-1)).toEqual({ phase: 'fetch', rows: 3, total: 3 })
    await expectError(loadDataset(path, { signal: AbortSignal.abort() }), ['aborted'], 'ERR_HSTU_ABORTED')
    const stop = new AbortController()
    const onProgress = () => stop.abort()
    await expectError(loadDataset(path, { signal: stop.signal, onProgress }), ['aborted'], 'ERR_HSTU_ABORTED')
  })
})

describe('bad input', () => {
  const rows = 'a,x,1,1\na,y,1,2\n'
  const table = (name: string, text: string | Buffer, parts: string[]) => async () => {
    const path = write(name, text)
    await expectError(loadDataset(path), [path, ...parts])
  }

  it('no such file', () => expectError(loadDataset('/nowhere/x.inter'), ['/nowhere/x.inter', 'no such file']))
  it('a directory', async () => {
    const path = write('folder/x', 'x')
    mkdirSync(`${path}.inter`)
    await expectError(loadDataset(`${path}.inter`), ['a directory'])
    await expectError(loadDataset(dirname(path)), ['a directory'])
  })
  it('binary', table('b.inter', Buffer.from([1, 2, 0, 3]), ['binary']))
  it('binary under another name', table('b.csv', gzipSync('x'), ['.gz']))
  it('not UTF-8', table('ratings_u.csv', Buffer.from('a,x,1,1\na,\xe9,1,2\n', 'latin1'), [':2: ', 'UTF-8']))
  it('not UTF-8 in a sequence file', table('u8.txt', Buffer.from('a x y z\nb \xe9 y z\n', 'latin1'), [':2: ', 'UTF-8']))
  it('empty', table('e.inter', '', ['empty']))
  it('blank lines alone', table('e2.inter', '\n\n', ['no rows']))
  it('header alone', table('e3.inter', inter, ['no rows']))
  it('unknown format', table('e4.bin', 'hello\n', ['Formats:', 'recbole', 'ratings_*.csv', 'jsonl']))
  it('too few columns', table('ratings_1.csv', `${rows}a,z\n`, [':3: ', 'expected 4 columns, found 2']))
  it('too many columns', table('ratings_2.csv', `${rows}\na,z,1,2,3\n`, [':4: ', 'expected 4 columns, found 5']))
  it('too few columns, .dat', table('x/ratings.dat', 'a::x::1::1\na::x\n', [':2: ', 'expected 4 columns']))
  it('a word as time', table('ratings_3.csv', `${rows}a,z,1,noon\n`, [':3: ', 'time in seconds', '"noon"']))
  it('a word as rating', table('ratings_4.csv', `${rows}\n\n\na,z,good,4\n`, [':6: ', 'rating', '"good"']))
  it('NaN rating', table('ratings_5.csv', `${rows}a,z,NaN,4\n`, [':3: ', 'finite number as rating', '"NaN"']))
  it('infinite rating', table('ratings_6.csv', `${rows}a,z,inf,4\n`, [':3: ', 'finite number as rating', '"inf"']))
  it('infinite time', table('ratings_7.csv', `${rows}a,z,1,1e999\n`, [':3: ', 'time in seconds', '"1e999"']))
  it('no time', table('ratings_8.csv', `${rows}a,z,1,\n`, [':3: ', 'time in seconds', 'nothing']))
  it('no user', table('ratings_9.csv', `${rows},z,1,3\n`, [':3: ', 'a user id', 'nothing']))
  it('no item', table('n.inter', `${inter}a\t\t1\t3\n`, [':2: ', 'an item id', 'nothing']))
  it('the first of several', table('ratings_10.csv', `${rows}a,z,bad,4\na,z,1,bad\n,z,1,1\n`, [':3: ', '"bad"']))
  it(
    'RecBole without its columns',
    table('c.inter', 'user:token\titem_id:token\n1\t2\n', [':1: ', '"user_id"', '"user", "item_id"']),
  )
  it('mapping to no column', async () => {
    const path = write('c.csv', 'who,what,when\n1,2,3\n')
    await expectError(loadDataset(path, { mapping: { user: 'who', item: 'item' } }), [
      '"item"',
      '"who", "what", "when"',
    ])
    await expectError(loadDataset(path, { mapping: { user: 0, item: 3 } }), ['no column 3', '0 .. 2'])
  })
  it('JSON lines', async () => {
    const mapping = { user: 'u', item: 'i' }
    await expectError(loadDataset(write('1.jsonl', '{"u":1,"i":2}\n\n{"u":1,\n'), { mapping }), [
      ':3: ',
      'a JSON object',
    ])
    await expectError(loadDataset(write('2.jsonl', '{"u":1,"i":2}\n{"u":1}\n'), { mapping }), [':2: ', 'an item id'])
    await expectError(loadDataset(write('3.jsonl', '[1,2]\n'), { mapping }), ['a JSON object'])
    await expectError(loadDataset(write('4.jsonl', '{"u":1,"x":2}\n'), { mapping }), ['no column "i"', '"u", "x"'])
  })
  it('sequence files', async () => {
    await expectError(loadDataset(write('d.txt', '1 a b c\n2 a b c\n1 d e f\n')), [':3: ', '"1"', 'line 1'])
    await expectError(loadDataset(write('d2.txt', '1 a b c\n2\n')), [':2: ', 'expected items'])
    await expectError(loadDataset(write('d3.txt', '1 a\n2 b\n')), ['no user has 3 actions'])
  })
  it('a times file that disagrees', async () => {
    const path = write('t.txt', '1 a b c\n2 a b c\n')
    const load = (text: string) => loadDataset(path, { times: write('tt.txt', text) })
    await expectError(load('1 1 2 3\n3 1 2 3\n'), ['tt.txt:2: ', 'user "2"', '"3"', `${path}:2`])
    await expectError(load('1 1 2 3\n2 1 2\n'), ['tt.txt:2: ', 'expected 3 times', 'found 2'])
    await expectError(load('1 1 2 3\n'), ['tt.txt:2: ', 'user "2"', 'the end'])
    await expectError(load('1 1 2 3\n2 1 2 3\n\n3 1\n'), ['tt.txt:4: ', 'the end', '"3"'])
    await expectError(load('1 1 2 x\n2 1 2 3\n'), ['tt.txt:1: ', 'time in seconds', '"x"'])
    await expectError(loadDataset(write('t.inter', inter), { times: path }), ['sequence'], 'ERR_HSTU_INVALID_ARGUMENT')
  })
  it('without DuckDB it says what to install, and sequence files still load', async () => {
    const path = write('ratings_d.csv', rows)
    vi.resetModules()
    vi.doMock('@duckdb/node-api', () => {
      throw new Error('Cannot find package')
    })
    const fresh = await import('#lib/data/load.js')
    const error = await fresh.loadDataset(path).catch((caught: unknown) => caught)
    expect(error).toMatchObject({ code: 'ERR_HSTU_DATA' })
    expect((error as Error).message).toContain('npm i @duckdb/node-api')
    expect((await fresh.loadDataset(write('ok.txt', '1 a b c\n'))).numUsers).toBe(1)
    vi.doUnmock('@duckdb/node-api')
  })
})
