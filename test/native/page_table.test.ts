import { execFile, execFileSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'

const build = fileURLToPath(new URL('../../build', import.meta.url))
const isConfigured = existsSync(join(build, 'CMakeCache.txt'))

// The page manager in C++ alone, against the naive model of page_table/model.h.
describe.skipIf(!isConfigured)('page manager against its naive model', () => {
  beforeAll(() => {
    execFileSync('cmake', ['--build', build, '--target', 'page_table_tests', '-j', '2'], { stdio: 'pipe' })
  }, 600_000)

  it.concurrent.each([
    ['as it is', 'plain', 1_000_000, 1],
    ['under AddressSanitizer and UndefinedBehaviorSanitizer', 'address_undefined', 400_000, 1],
    ['of two threads, a manager each, under ThreadSanitizer', 'thread', 200_000, 2],
  ])('%s', async (_, kind, operations, threads) => {
    const program = join(build, 'page_table', `page_table_${kind}`)
    const { stdout } = await promisify(execFile)(program, [String(operations), String(threads)], { timeout: 100_000 })
    const did = JSON.parse(stdout) as Record<string, number>
    expect(did.operations).toBe(operations)
    // Every kind of thing happened, and often.
    for (const what of ['cachedTokens', 'evicted', 'exhausted', 'forgotten'])
      expect(did[what], what).toBeGreaterThan(operations / 100)
    expect(did.duplicates).toBeGreaterThan(operations / 2000)
  })
})
