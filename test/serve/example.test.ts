import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { beforeAll, expect, it } from 'vitest'
import { Random } from '#lib/random.js'
import { buildIfMissing, temporaryFolder } from '../cli/process.js'
import { randomRequest, writeTestBundle } from './requests.js'

const bundle = join(temporaryFolder(), 'bundle')
beforeAll(async () => {
  buildIfMissing()
  await writeTestBundle(bundle)
})

it('examples/rank_service.mjs answers over HTTP, says what is wrong, and ends when told to', async () => {
  const example = fileURLToPath(new URL('../../examples/rank_service.mjs', import.meta.url))
  const child = spawn(process.execPath, [example, bundle, '0'], { stdio: ['ignore', 'pipe', 'inherit'] })
  try {
    const [line] = (await once(child.stdout, 'data')) as [Buffer]
    const [, model, port] = /^(\S+) on (\d+)/.exec(line.toString())!
    expect(model).toBe('test-1')
    const url = `http://127.0.0.1:${port}`
    const rank = async (body: unknown) => {
      const text = typeof body === 'string' ? body : JSON.stringify(body)
      const response = await fetch(`${url}/rank`, { method: 'POST', body: text })
      return { code: response.status, ...((await response.json()) as Record<string, unknown>) }
    }
    expect((await fetch(`${url}/ready`)).status).toBe(200)
    const request = randomRequest(new Random(20), 70, 3)
    const first = await rank(request)
    expect(first).toMatchObject({ code: 200, model: 'test-1', cache: 'cold', scores: { like: expect.any(Array) } })
    expect(await rank(request)).toEqual({ ...first, cache: 'hit' })
    expect(await rank({ ...request, candidates: [] })).toEqual({ code: 400, error: 'request: there are no candidates' })
    expect(await rank('{')).toMatchObject({ code: 400 })
  } finally {
    child.kill('SIGTERM')
  }
  expect((await once(child, 'close'))[0]).toBe(0)
})
