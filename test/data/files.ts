import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { afterAll, beforeAll, expect } from 'vitest'
import type { SequenceDataset } from '#lib/data/dataset.js'
import { HstuError } from '#lib/errors.js'

/** A folder of the test file's own; the returned function writes a file into it and returns its path. */
export function temporaryFiles(): (name: string, content: string | Buffer) => string {
  let folder = ''
  beforeAll(() => {
    folder = mkdtempSync(join(tmpdir(), 'hstu-test-'))
  })
  afterAll(() => rmSync(folder, { recursive: true, force: true }))
  return (name, content) => {
    const path = join(folder, name)
    mkdirSync(dirname(path), { recursive: true })
    writeFileSync(path, content)
    return path
  }
}

/** Each user's external item ids. */
export function histories(dataset: SequenceDataset): Record<string, string[]> {
  return Object.fromEntries(
    dataset.userIds.map((user, u) => [
      user,
      Array.from(dataset.items.subarray(dataset.offsets[u], dataset.offsets[u + 1]), item => dataset.itemIds[item]!),
    ]),
  )
}

/** Expects ERR_HSTU_DATA (or `code`) with a message that has every one of `parts`. */
export async function expectError(promise: Promise<unknown>, parts: string[], code = 'ERR_HSTU_DATA') {
  const error = await promise.then(
    () => null,
    (caught: unknown) => caught,
  )
  expect(error).toBeInstanceOf(HstuError)
  expect((error as HstuError).code).toBe(code)
  for (const part of parts) expect((error as HstuError).message).toContain(part)
}

/** A dataset from one list of item ids a user; time of the k-th action of user u is 1000 u + 10 k. */
export function handmade(lists: number[][], timed = true): SequenceDataset {
  const offsets = new Int32Array(lists.length + 1)
  lists.forEach((list, u) => {
    offsets[u + 1] = offsets[u]! + list.length
  })
  const numItems = Math.max(...lists.flat())
  return {
    name: 'handmade',
    numUsers: lists.length,
    numItems,
    userIds: lists.map((_, u) => `u${u}`),
    itemIds: Array.from({ length: numItems + 1 }, (_, i) => (i === 0 ? '' : `i${i}`)),
    offsets,
    items: Int32Array.from(lists.flat()),
    times: timed ? BigInt64Array.from(lists.flatMap((list, u) => list.map((_, k) => BigInt(1000 * u + 10 * k)))) : null,
    ratings: null,
    stats: { rows: offsets.at(-1)!, skippedUsers: 0, skippedActions: 0, outOfOrder: 0, minActions: 1, warnings: [] },
  }
}
