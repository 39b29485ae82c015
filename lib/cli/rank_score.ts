import { open } from 'node:fs/promises'
import { createInterface } from 'node:readline'
import { HstuError } from '../errors.js'
import { Ranker } from '../serve/ranker.js'
import type { RankRequest } from '../serve/request.js'
import type { Args } from './args.js'
import { engineOptions } from './engine_options.js'
import { counted, print } from './output.js'

/** Requests under way: enough for full batches, and fewer than the engine takes. */
const WINDOW = 256

/** One line of the answer: `{line, id, scores, ...}`, or `{line, id, error}`. */
async function answer(ranker: Ranker, text: string, line: number): Promise<{ text: string; failed: boolean }> {
  let id: unknown
  try {
    let request: RankRequest & { id?: unknown }
    try {
      request = JSON.parse(text)
    } catch (cause) {
      throw new HstuError('ERR_HSTU_DATA', `no JSON document: ${(cause as Error).message}`, { cause })
    }
    id = request?.id
    const { scores, model, cache, unknownIds } = await ranker.rank(request)
    const plain = Object.entries(scores).map(([task, values]) => [task, Array.from(values)])
    return {
      text: JSON.stringify({ line, id, scores: Object.fromEntries(plain), model, cache, unknownIds }),
      failed: false,
    }
  } catch (error) {
    if (!(error instanceof HstuError)) throw error
    return { text: JSON.stringify({ line, id, error: { code: error.code, message: error.message } }), failed: true }
  }
}

export async function run(args: Args): Promise<number | undefined> {
  const unknownIds = args.text('unknown-ids') as 'error' | 'unknown-row' | undefined
  const path = args.text('in')
  const input = path === undefined ? process.stdin : (await open(path)).createReadStream()
  await using ranker = await Ranker.load(args.required('bundle'), {
    ...engineOptions(args),
    ...(unknownIds ? { unknownIds } : {}),
  })
  const answers: Promise<{ text: string; failed: boolean }>[] = []
  let [line, failed, scored] = [0, 0, 0]
  const tell = async () => {
    const { text, failed: bad } = await answers.shift()!
    print(text)
    if (bad) failed++
    else scored++
  }
  // Answers come in the order of the lines.
  for await (const text of createInterface({ input, crlfDelay: Infinity })) {
    line++
    if (text.trim() === '') continue
    answers.push(answer(ranker, text, line))
    if (answers.length >= WINDOW) await tell()
  }
  while (answers.length > 0) await tell()
  process.stderr.write(`${counted(scored, 'request')} scored${failed > 0 ? `, ${failed} not` : ''}\n`)
  return failed > 0 ? 1 : undefined
}
