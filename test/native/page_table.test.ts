import { execFile, execFileSync } from 'node:child_process'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'

const source = fileURLToPath(new URL('page_table', import.meta.url))
const build = fileURLToPath(new URL('../../build/page_table', import.meta.url))
const cmake = (...args: string[]) => execFileSync('cmake', args, { stdio: 'pipe' })

// The page manager in C++ alone, against the naive model of page_table/model.h.
describe('page manager against its naive model', () => {
  beforeAll(() => {
    cmake('-S', source, '-B', build)
    cmake('--build', build, '-j', '2')
  }, 600_000)

  it.concurrent.each([
    ['as it is', 'plain', 1_000_000, 1],
    ['under AddressSanitizer and UndefinedBehaviorSanitizer', 'address_undefined', 400_000, 1],
    ['of two threads, a manager each, under ThreadSanitizer', 'thread', 200_000, 2],
  ])('%s', async (_, program, operations, threads) => {
    const run = promisify(execFile)(join(build, program), [String(operations), String(threads)], { timeout: 100_000 })
    const did = JSON.parse((await run).stdout) as Record<string, number>
    expect(did.operations).toBe(operations)
    // Every kind of thing happened, and often.
    for (const what of ['cachedTokens', 'evicted', 'exhausted', 'forgotten'])
      expect(did[what], what).toBeGreaterThan(operations / 100)
    expect(did.duplicates).toBeGreaterThan(operations / 2000)
  })
})
