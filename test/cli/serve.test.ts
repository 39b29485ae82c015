import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { beforeAll, describe, expect, it } from 'vitest'
import type { RankerManifest, RetrieverManifest } from '#lib/serve/bundle.js'
import { buildIfMissing, hstu, temporaryFolder, writeActions } from './process.js'

beforeAll(buildIfMissing)
const folder = temporaryFolder()
const at = (name: string) => join(folder, name)
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
