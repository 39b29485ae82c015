import { join } from 'node:path'
import { beforeAll, describe, expect, it } from 'vitest'
import { HSTU } from '#lib/models/hstu.js'
import { Random } from '#lib/random.js'
import { type RetrieverManifest, writeBundle } from '#lib/serve/bundle.js'
import { Ranker } from '#lib/serve/ranker.js'
import { retrieve } from '#lib/serve/retrieve.js'
import { Retriever } from '#lib/serve/retriever.js'
import { buildIfMissing, temporaryFolder } from '../cli/process.js'

const folder = join(temporaryFolder(), 'bundle')
const config = {
  ...{ numItems: 50, dim: 16, layers: 2, heads: 2, qkDim: 8, vDim: 8, maxLength: 12, paddedLength: 16 },
  ...{ inputDropout: 0, linearDropout: 0 },
}
const ids = Array.from({ length: 50 }, (_, k) => `i${k + 1}`)
const model = new HSTU(config, 4)

beforeAll(async () => {
  buildIfMissing()
  const random = new Random(2)
  for (const tensor of Object.values(model.parameters))
    tensor.write((tensor.dataSync() as Float32Array).map(x => x + 0.2 * random.normal()))
  const golden = { items: ['i3', 'i9'], times: [100, 200], time: 300 }
  const rows = { items: BigInt64Array.of(3n, 9n), times: BigInt64Array.of(100n, 200n), time: 300n }
  const [best] = retrieve(model, [rows], 5)
  await writeBundle<RetrieverManifest>(
    folder,
    {
      ...{ type: 'retriever', model: 'r-1', architecture: { kind: 'hstu', config }, precision: 'float32' },
      golden: { ...golden, best: Array.from(best!.items, item => ids[item - 1]!), scores: Array.from(best!.scores) },
    },
    { tensors: { model: model.parameters }, vocabularies: [ids] },
  )
})
const error = (code: string, message: RegExp) =>
  expect.objectContaining({ code, message: expect.stringMatching(message) })

describe('Retriever', () => {
  it('gives the best items of all, whoever else is in the batch', async () => {
    await using retriever = await Retriever.load(folder, { device: 'cpu', threads: 1, maxDelayMs: 30 })
    const random = new Random(3)
    const requests = Array.from({ length: 12 }, (_, r) => {
      const length = 1 + random.int(20)
      const items = Array.from({ length }, () => `i${1 + random.int(50)}`)
      const times = Array.from({ length }, (_, t) => 1000 + 60 * t)
      return { history: r % 4 === 3 ? { items } : { items, times }, k: 5 + (r % 2), time: 9000 }
    })
    const results = await Promise.all(requests.map(request => retriever.retrieve(request)))
    const table = model.itemEmbeddings()
    results.forEach(({ items, scores, model: name }, r) => {
      const { history, k } = requests[r]!
      const rows = {
        items: BigInt64Array.from(history.items, id => BigInt(id.slice(1))),
        times: 'times' in history ? BigInt64Array.from(history.times!, BigInt) : null,
        time: 9000n,
      }
      const kept = rows.items.slice(-12)
      const [alone] = retrieve(model, [{ ...rows, items: kept, times: rows.times?.slice(-12) ?? null }], k, table)
      expect(items).toEqual(Array.from(alone!.items, item => ids[item - 1]!))
      expect(scores).toEqual(alone!.scores)
      expect([items.length, name]).toEqual([k, 'r-1'])
      expect(items.filter(item => history.items.slice(-12).includes(item))).toEqual([])
    })
    table.dispose()
    expect((await retriever.stats()).batches).toBe(1)
    const all = await retriever.retrieve({ history: { items: ['i1', 'i2', 'nothing'] }, k: 100 })
    expect([all.items.length, all.unknownIds]).toEqual([48, 1])
    const some = await retriever.retrieve({ history: { items: ['i1'] }, k: 100, exclude: ['i5', 'i5', 'zz'] })
    expect(some.items.length).toBe(49)
    expect(some.items).toContain('i1')
  })

  it('names what is wrong with a request or a bundle, and goes on', async () => {
    await using retriever = await Retriever.load(folder, { device: 'cpu', threads: 1 })
    const bad = (request: object, message: RegExp) =>
      expect(retriever.retrieve(request as never)).rejects.toThrow(error('ERR_HSTU_INVALID_ARGUMENT', message))
    await bad({ history: { items: [] } }, /history\.items is empty/)
    await bad({ history: { items: ['i1'], times: [1, 2] } }, /history\.times has 2 entries, history\.items 1/)
    await bad({ history: { items: ['i1'], times: [0.5] } }, /history\.times\[0\] must be a whole number of seconds/)
    await bad({ history: { items: ['i1'] }, k: 0 }, /k must be a whole number in 1/)
    await bad({ history: { items: ['nothing'] } }, /no item of the history is known/)
    expect((await retriever.retrieve({ history: { items: ['i1'] } })).items.length).toBe(10)
    await expect(Ranker.load(folder, { device: 'cpu' })).rejects.toThrow(
      error('ERR_HSTU_CHECKPOINT', /json\.type: expected 'ranker', found 'retriever'/),
    )
    expect(await retriever.swap(folder)).toBe('r-1')
  })
})
