import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { inspectDataset } from '#lib/data/inspect.js'
import { loadDataset, loadItemTitles } from '#lib/data/load.js'

const folder = process.env.HSTU_DATA ?? ''
const file = (name: string) => join(folder, name)
const missing = (...names: string[]) => {
  const absent = folder === '' || names.some(name => !existsSync(file(name)))
  if (absent)
    console.warn(`skipped: ${names.join(', ')} not found; set HSTU_DATA to the folder that has ml-100k/ and amazon/`)
  return absent
}

describe('real data', () => {
  it.skipIf(missing('ml-100k/ml-100k.inter', 'ml-100k/ml-100k.item'))('MovieLens-100K', async () => {
    const data = await loadDataset(file('ml-100k/ml-100k.inter'))
    expect([data.numUsers, data.numItems, data.items.length]).toEqual([943, 1682, 100_000])
    const report = inspectDataset(data)
    expect(report.time).toMatchObject({ first: 874_724_710, last: 893_286_638 })
    expect(report.stats).toMatchObject({ skippedUsers: 0, warnings: [] })
    expect(report.popularItems[0]).toEqual({ id: '50', count: 583, share: 0.00583 })
    for (let u = 0; u < data.numUsers; u++) {
      for (let row = data.offsets[u]! + 1; row < data.offsets[u + 1]!; row++) {
        if (data.times![row]! < data.times![row - 1]!) expect.fail(`user ${u} is not in time order`)
      }
    }
    const titles = await loadItemTitles(file('ml-100k/ml-100k.item'))
    expect(titles.get('1')).toBe('Toy Story')
    expect(data.itemIds.slice(1).every(id => titles.has(id))).toBe(true)
  })

  it.skipIf(missing('amazon/beauty.txt', 'amazon/beauty_time.txt'))('Amazon Beauty', async () => {
    const data = await loadDataset(file('amazon/beauty.txt'), { times: file('amazon/beauty_time.txt') })
    expect([data.numUsers, data.numItems, data.items.length]).toEqual([22_363, 12_101, 198_502])
    const report = inspectDataset(data)
    expect(report.length.max).toBe(204)
    expect(report.time!.equalNeighbours).toBeCloseTo(0.44, 1)
    expect(data.stats).toMatchObject({ skippedUsers: 0, outOfOrder: 0 })
  })

  it.skipIf(missing('amazon/toys.txt'))('Amazon Toys, without times', async () => {
    const data = await loadDataset(file('amazon/toys.txt'))
    expect([data.numUsers, data.numItems, data.items.length]).toEqual([19_412, 11_924, 167_597])
    expect(data.times).toBeNull()
  })

  it.skipIf(missing('deskdrop/interactions.csv'))('a feed with 64-bit ids, by mapping', async () => {
    const mapping = { user: 'person_id', item: 'content_id', time: 'timestamp' }
    const data = await loadDataset(file('deskdrop/interactions.csv'), { mapping, minActions: 1 })
    expect([data.numUsers, data.numItems, data.items.length]).toEqual([1895, 2987, 72_312])
    expect(data.userIds.some(id => BigInt(id) !== BigInt(Number(id)))).toBe(true)
  })
})
