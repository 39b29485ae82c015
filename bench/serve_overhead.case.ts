import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { captureGraph } from '#lib/graph.js'
import { RankerInference } from '#lib/models/ranker_inference.js'
import { type LoadedBundle, makeRanker, type RankerManifest, readBundle } from '#lib/serve/bundle.js'
import { encodeRequest, historyTokens } from '#lib/serve/encode.js'
import { Falcon } from '#lib/serve/falcon.js'
import { LoadSource } from '#lib/serve/load.js'
import type { Timings } from '#lib/serve/messages.js'
import { bindPass, bucketOf, fillPass, shapeOf } from '#lib/serve/pass.js'
import { Ranker } from '#lib/serve/ranker.js'
import { checkRequest, type RankRequest } from '#lib/serve/request.js'
import { writeSyntheticBundle } from '#lib/serve/synthetic.js'
import { type Device, scope, Tensor } from '#lib/tensor.js'
import { benchCase, type Row, round } from './harness.js'
import { median } from './timing.js'

const PAGE = 64
const cases = [
  { history: 128, candidates: 64 },
  { history: 512, candidates: 256 },
  { history: 2048, candidates: 1024 },
]
const REQUESTS = 400
/** Until the engine runs what is compiled of it: a service is past that in seconds. */
const WARM_UP = 2000

/** The same request with its ids as text, as they mostly come, and as whole numbers in arrays of their own. */
const forms = {
  text: (request: RankRequest) => request,
  int64: ({ history, candidates, ...other }: RankRequest): RankRequest => {
    const wide = (values: ArrayLike<unknown>) => BigInt64Array.from(values as string[], BigInt)
    const { items, times, actions } = history
    const columns = { items: wide(items), times: wide(times), actions: Int32Array.from(actions as number[]) }
    return { ...other, history: { ...history, ...columns }, candidates: wide(candidates) }
  },
}

/**
 * Milliseconds that a device computes the passes of requests whose histories are cached: graph after graph without a pause, for the
 * device's caches are warm in a service too.
 */
function deviceTimes(bundle: LoadedBundle<RankerManifest>, requests: readonly RankRequest[], device: Device): number[] {
  const { model } = makeRanker(bundle, { device })
  const inference = new RankerInference(model, null)
  try {
    return requests.map(request => deviceTime(bundle, request, inference, device))
  } finally {
    inference.dispose()
    model.dispose()
  }
}

function deviceTime(
  bundle: LoadedBundle<RankerManifest>,
  request: RankRequest,
  inference: RankerInference,
  device: Device,
): number {
  const { model } = inference
  const { schema } = bundle.manifest
  const encoder = { config: model.config, vocabularies: bundle.vocabularies, unknownIds: 'error' as const }
  const encoded = encodeRequest(checkRequest(request, { ...schema, maxHistory: 1e6, maxCandidates: 1e6 }), encoder)
  const h = historyTokens(encoded)
  const pages = Int32Array.from({ length: Math.ceil(h / PAGE) }, (_, k) => k)
  const falcon = new Falcon(model, null, PAGE, pages.length)
  const cached = Math.min(h - (h % PAGE), h - 1)
  const slot = { request: encoded, pages, cached, stored: cached }
  const parts = [{ slot, index: 0, from: cached, first: 0, end: encoded.candidates.length }]
  try {
    return scope(() => {
      const shape = device === 'cpu' ? shapeOf(parts, inference) : bucketOf(shapeOf(parts, inference))
      const { words, numbers } = fillPass(parts, shape, inference)
      const on = [words, numbers].map(data => Tensor.from(data, undefined, { device })) as [Tensor, Tensor]
      const compute = () => {
        const { inputs, layers } = bindPass(...on, shape, inference, falcon.pages)
        return inference.run(inputs, layers, null).logits
      }
      const graph = captureGraph(compute, { device })
      const took = (count: number) => {
        graph.outputs.dataSync()
        const begin = performance.now()
        for (let i = 0; i < count; i++) graph.replay()
        graph.outputs.dataSync()
        return performance.now() - begin
      }
      took(5)
      const ms = median(Array.from({ length: 9 }, () => (took(24) - took(4)) / 20))
      graph.dispose()
      return ms
    })
  } finally {
    falcon.dispose()
  }
}

const quantile = (values: readonly number[], q: number) =>
  [...values].sort((a, b) => a - b)[Math.min(values.length - 1, Math.floor(q * values.length))]!

/** What one request after the other takes, and the engine's own account of it. */
async function answers(ranker: Ranker, requests: readonly RankRequest[], devices: readonly number[]) {
  const all: (Timings & { wall: number; device: number })[] = []
  for (let i = 0; i < REQUESTS; i++) {
    const which = i % requests.length
    const begin = performance.now()
    const { timings } = await ranker.rank(requests[which]!)
    all.push({ ...timings, wall: performance.now() - begin, device: devices[which]! })
    await new Promise(resolve => setImmediate(resolve))
  }
  return all.slice(REQUESTS >> 2)
}

async function rowsOf(device: Device): Promise<Row[]> {
  const folder = mkdtempSync(join(tmpdir(), 'hstu-bench-'))
  const rows: Row[] = []
  try {
    await writeSyntheticBundle(folder, device === 'cpu' ? 'small' : 'large')
    const bundle = (await readBundle(folder)) as LoadedBundle<RankerManifest>
    await using ranker = await Ranker.load(folder, { device })
    let warmUp = device === 'cpu' ? 0 : WARM_UP
    for (const c of cases) {
      const { schema } = ranker.info
      const { ids: items } = bundle.vocabularies[1]!
      const source = new LoadSource({ ...c, items, schema, users: 8, zipf: 0, growth: 0, seed: 1 })
      const requests = Array.from({ length: 8 }, () => source.next('hit'))
      const devices = deviceTimes(bundle, requests, device)
      for (const [ids, form] of Object.entries(forms)) {
        const own = requests.map(form)
        for (const request of own) await ranker.rank(request)
        for (; warmUp > 0; warmUp--) await ranker.rank(own[warmUp % own.length]!)
        const all = await answers(ranker, own, devices)
        const us = (of: (answer: (typeof all)[number]) => number, q = 0.5) => round(1e3 * quantile(all.map(of), q))
        rows.push({
          ...{ case: 'serve.overhead', ...c, ids, unit: 'us', device: us(a => a.device) },
          ...{ wall: us(a => a.wall), hstu: us(a => a.wall - a.device), p99: us(a => a.wall - a.device, 0.99) },
          // The caller's thread and the way back; the way to the engine's thread; encoding and pages; the pass beside the device.
          ...{ caller: us(a => a.wall - a.total), queue: us(a => a.queue) },
          ...{ host: us(a => a.total - a.queue - a.prefill - a.candidates), pass: us(a => a.prefill - a.device) },
        })
      }
    }
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
  return rows
}

/** `Ranker.rank` of a cached history, alone: what it takes beside the device's time of the pass, microseconds, and where. */
benchCase('serve_overhead', { dtypes: ['bfloat16'], run: ({ device }) => rowsOf(device) })
