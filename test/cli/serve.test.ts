import { readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { beforeAll, describe, expect, it } from 'vitest'
import type { RankerManifest, RetrieverManifest } from '#lib/serve/bundle.js'
import { buildIfMissing, hstu, temporaryFolder, writeActions } from './process.js'

beforeAll(buildIfMissing)
const folder = temporaryFolder()
const at = (name: string) => join(folder, name)
/** Of the items, after the user and one contextual feature. */
const vocabularyFile = () => readdirSync(at('bundle-dense')).find(name => name.startsWith('vocabulary-2'))!
const manifestOf = (name: string) => JSON.parse(readFileSync(at(`${name}/manifest.json`), 'utf8'))

describe('export', () => {
  it.each(['dense', 'hash'])('makes a bundle of a ranking run, embeddings %s', async embeddings => {
    const [requests, run, bundle] = ['requests', embeddings, `bundle-${embeddings}`].map(at)
    const sizes = ['users=30', 'items=60', 'categories=10', 'days=6'].flatMap(pair => ['--set', pair])
    await hstu(['data', 'prepare', '--preset', 'ranking/synthetic', ...sizes, '--out', requests!])
    const small = ['--model-set', 'layers=1', '--model-set', `embeddings=${embeddings}`, '--device', 'cpu']
    const train = ['rank', 'train', '--preset', 'ranking/synthetic', '--requests', requests!, '--out', run!]
    expect(await hstu([...train, ...small, '--batch-size', '16', '--task', 'like = LIKE'])).toMatchObject({ code: 0 })

    const refused = await hstu(['export', '--checkpoint', run!, '--out', bundle!])
    expect(refused).toMatchObject({ code: 1, stderr: expect.stringMatching(/has no records of its own/) })
    const made = await hstu(['export', '--checkpoint', run!, '--requests', requests!, '--out', bundle!])
    expect(made).toMatchObject({ code: 0, stdout: expect.stringMatching(/: ranker \d+-[0-9a-f]{12}\n$/) })
    const { kind, json } = manifestOf(`bundle-${embeddings}`) as { kind: string; json: RankerManifest }
    expect(kind).toBe('bundle')
    expect(json.architecture).toMatchObject({ layers: 1, embeddings, tasks: [{ name: 'like' }] })
    expect(json.golden.logits.length).toBe(8)
    expect(json.schema.actions).toContain('LIKE')
    expect(json.table === null).toBe(embeddings === 'dense')
  })

  it('keeps the rates that the logits of a run stand on', async () => {
    const where = ['--requests', at('requests'), '--out', at('rated')]
    const small = ['--model-set', 'layers=1', '--batch-size', '16', '--task', 'like = LIKE', '--device', 'cpu']
    const rates = ['--set', 'baseRateWindow=100', '--set', 'idRates=true', '--set', 'supervise=candidates']
    expect(await hstu(['rank', 'train', '--preset', 'ranking/synthetic', ...where, ...small, ...rates])).toMatchObject({
      code: 0,
    })
    const files = ['--checkpoint', at('rated'), '--requests', at('requests'), '--out', at('bundle-rated')]
    expect(await hstu(['export', ...files])).toMatchObject({ code: 0 })
    const { json } = manifestOf('bundle-rated') as { json: RankerManifest }
    expect(json.rates).toMatchObject({ ids: true, base: [[expect.any(Number), expect.any(Number)]] })
    const users = readdirSync(at('bundle-rated')).find(name => name.startsWith('vocabulary-0'))!
    const ids = JSON.parse(readFileSync(at(`bundle-rated/${users}`), 'utf8')) as string[]
    expect(json.tensors.rates!['rates.users']!.shape).toEqual([2 * (ids.length + 1)])
  })

  it('makes a bundle of a retrieval run', async () => {
    const { data } = writeActions(folder)
    const train = ['train', '--data', data, '--preset', 'ml-100k/hstu', '--epochs', '1', '--out', at('retrieval')]
    expect(await hstu([...train, '--device', 'cpu'])).toMatchObject({ code: 0 })
    const made = await hstu(['export', '--checkpoint', at('retrieval'), '--out', at('retriever'), '--json'])
    expect(JSON.parse(made.stdout)).toMatchObject({ type: 'retriever', folder: at('retriever') })
    const { json } = manifestOf('retriever') as { json: RetrieverManifest }
    expect(json.golden.best.length).toBe(10)
    expect(new Set([...json.golden.best, ...json.golden.items]).size).toBe(10 + json.golden.items.length)
    const missing = await hstu(['export', '--checkpoint', at('nothing'), '--out', at('x')])
    expect(missing).toMatchObject({ code: 1, stderr: expect.stringMatching(/nothing: no such folder/) })
  })
})

/** A bundle of a ranking run, from the test above. */
const scored = (args: string[]) => hstu(['rank', 'score', '--bundle', at('bundle-dense'), '--device', 'cpu', ...args])

describe('rank score', () => {
  it('answers each line in order, and says which were wrong', async () => {
    const items = JSON.parse(readFileSync(at(`bundle-dense/${vocabularyFile()}`), 'utf8')) as string[]
    const request = (id: number, candidates: string[]) => ({
      ...{ id, user: 'nobody', candidates, time: 2_000_000 },
      history: { items: items.slice(0, 9), times: Array.from({ length: 9 }, (_, k) => 1_000_000 + k) },
    })
    const [a, b] = [request(1, items.slice(0, 3)), request(2, items.slice(1, 3).reverse())]
    writeFileSync(
      at('in.jsonl'),
      [a, '', 'nonsense', { ...a, candidates: [] }, b]
        .map(x => (typeof x === 'string' ? x : JSON.stringify(x)))
        .join('\n'),
    )
    const answer = await scored(['--in', at('in.jsonl')])
    expect(answer).toMatchObject({ code: 1, stderr: '2 requests scored, 2 not\n' })
    const lines = answer.stdout
      .trim()
      .split('\n')
      .map(line => JSON.parse(line))
    expect(lines.map(({ line, id }) => [line, id])).toEqual([
      [1, 1],
      [3, undefined],
      [4, 1],
      [5, 2],
    ])
    expect(lines[1].error).toMatchObject({ code: 'ERR_HSTU_DATA', message: expect.stringMatching(/no JSON document/) })
    expect(lines[2].error).toEqual({ code: 'ERR_HSTU_INVALID_ARGUMENT', message: 'request: there are no candidates' })
    expect(lines[3].scores.like).toEqual(lines[0].scores.like.slice(1).reverse())
    const strict = await scored(['--in', at('in.jsonl'), '--unknown-ids', 'error'])
    expect(strict.stdout).toMatch(/user nobody is not in vocabulary 'user'/)
    expect(await scored(['--in', at('none.jsonl')])).toMatchObject({ code: 1, stdout: '' })
  })
})

describe('bench serve', () => {
  it('offers load to a bundle and reports cold, cached and mixed apart', async () => {
    const small = ['--rate', '20', '--seconds', '0.5', '--users', '10', '--history', '20', '--candidates', '5']
    const bench = (...more: string[]) =>
      hstu(['bench', 'serve', '--bundle', at('bundle-dense'), '--device', 'cpu', ...small, ...more])
    const { stdout } = await bench('--json', '--bound', '5000')
    const { rows, modes, stats } = JSON.parse(stdout)
    expect(rows.map(({ mode }: { mode: string }) => mode)).toEqual(['cold', 'hit', 'mixed'])
    for (const row of rows) {
      expect(row.completed + row.refused + row.late).toBe(row.requests)
      expect(row.p50).toBeLessThanOrEqual(row.p99)
    }
    expect(rows[0].cachedShare).toBe(0)
    for (const mode of ['cold', 'hit', 'mixed']) expect(modes[mode].capacity).toBeGreaterThan(0)
    expect(stats).toMatchObject({ state: 'ready', queued: { requests: 0 } })
    expect((await bench()).stdout).toMatch(/^open loop +offered \/s +sent \/s +in 80 ms \/s/m)
  })

  it('needs no bundle: a ranker of random parameters does, and says what an overload does to it', async () => {
    const load = ['--seconds', '0.2', '--users', '10', '--history', '20', '--candidates', '5', '--device', 'cpu']
    const { stdout } = await hstu(['bench', 'serve', '--synthetic', 'small', ...load, '--json'])
    const { model, rows, modes } = JSON.parse(stdout)
    expect([model, rows.length]).toEqual(['synthetic-small', 12])
    for (const mode of ['cold', 'hit', 'mixed']) {
      expect(modes[mode].underOverload).toBeGreaterThan(0)
      expect(modes[mode].overheadP99).toBeGreaterThanOrEqual(modes[mode].overheadP50)
    }
    expect(rows[3].refused).toBeGreaterThan(0)
    const none = await hstu(['bench', 'serve'])
    expect(none).toMatchObject({ code: 2, stderr: expect.stringMatching(/takes --bundle or --synthetic/) })
    const both = await hstu(['bench', 'serve', '--bundle', at('bundle-dense'), '--synthetic', 'small'])
    expect(both).toMatchObject({ code: 2 })
  })
})
