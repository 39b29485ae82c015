// What the tests of the ranking engine share.
import { join } from 'node:path'
import { afterAll, beforeAll, expect } from 'vitest'
import { trainingLogits } from '#lib/serve/golden.js'
import type { RankerOptions, RankResult } from '#lib/serve/ranker.js'
import type { RankRequest } from '#lib/serve/request.js'
import { buildIfMissing, temporaryFolder } from '../cli/process.js'
import { config, schema, stirred, wireOf, writeTestBundle } from './requests.js'

export const small: RankerOptions = { device: 'cpu', threads: 1, cacheBytes: 4 << 20, microbatch: 7 }
export const error = (code: string, message: RegExp) =>
  expect.objectContaining({ name: 'HstuError', code, message: expect.stringMatching(message) })

/** A bundle for the tests of a file, its parts, and the scores that they give. */
export function rankerBundle() {
  const folder = temporaryFolder()
  const bundle = join(folder, 'bundle')
  const parts = stirred({})
  afterAll(() => parts.model.dispose())
  beforeAll(async () => {
    buildIfMissing()
    await writeTestBundle(bundle)
  })

  /** The scores that the candidates have alone, by the training path. */
  function scoresOf(request: RankRequest, maxHistory = 100): Record<string, number[]> {
    const K = config.tasks.length
    const logits = trainingLogits(parts, [wireOf(request, maxHistory)], parts.encoder, schema)
    const of = (k: number) => Array.from({ length: logits.length / K }, (_, m) => logits[m * K + k]!)
    return { like: of(0).map(z => 1 / (1 + Math.exp(-z))), watch: of(1) }
  }

  function expectScores(result: RankResult, request: RankRequest, maxHistory = 100): void {
    const plain = Object.fromEntries(Object.entries(result.scores).map(([task, scores]) => [task, Array.from(scores)]))
    expect(plain).toEqual(scoresOf(request, maxHistory))
  }

  return { folder, bundle, parts, scoresOf, expectScores }
}
