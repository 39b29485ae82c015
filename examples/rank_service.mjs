// A ranking service: node examples/rank_service.mjs BUNDLE [PORT]
//
//     curl -d '{"user": "7", "history": {"items": ["3"], "times": [100]}, "candidates": ["5", "9"]}' localhost:8080/rank
import { createServer } from 'node:http'
import { Ranker } from 'hstu'

const [bundle, port = '8080'] = process.argv.slice(2)
const ranker = await Ranker.load(bundle)
const status = {
  ERR_HSTU_INVALID_ARGUMENT: 400,
  ERR_HSTU_OVERLOADED: 429,
  ERR_HSTU_ABORTED: 504,
  ERR_HSTU_DISPOSED: 503,
}

const server = createServer(async (request, response) => {
  const answer = (code, body, headers = {}) =>
    response.writeHead(code, { 'content-type': 'application/json', ...headers }).end(JSON.stringify(body))
  try {
    if (request.url === '/ready') return answer(ranker.state === 'ready' ? 200 : 503, { state: ranker.state })
    const gone = new AbortController()
    response.once('close', () => gone.abort())
    const chunks = []
    for await (const chunk of request) chunks.push(chunk)
    const { user, history, candidates, context, time } = JSON.parse(Buffer.concat(chunks).toString())
    const result = await ranker.rank({ user, history, candidates, context, time, signal: gone.signal, deadlineMs: 200 })
    const scores = Object.entries(result.scores).map(([task, values]) => [task, Array.from(values)])
    answer(200, { scores: Object.fromEntries(scores), model: result.model, cache: result.cache.state })
  } catch (error) {
    const retry = error.retryAfterMs ? { 'retry-after': Math.ceil(error.retryAfterMs / 1000) } : {}
    answer(error instanceof SyntaxError ? 400 : (status[error.code] ?? 500), { error: error.message }, retry)
  }
})
server.listen(Number(port), '127.0.0.1', () => console.log(`${ranker.info.model} on ${server.address().port}`))
process.once('SIGTERM', () => server.close(() => ranker.close()))
