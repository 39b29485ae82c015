import { captureGraph } from '#lib/graph.js'
import { GenerativeRanker, type GenerativeRankerConfig } from '#lib/models/generative_ranker.js'
import { RankerInference } from '#lib/models/ranker_inference.js'
import { Random } from '#lib/random.js'
import { encodeRequest, historyTokens } from '#lib/serve/encode.js'
import { Falcon } from '#lib/serve/falcon.js'
import { bindPass, fillPass, type Slot, shapeOf } from '#lib/serve/pass.js'
import { memory, scope, Tensor } from '#lib/tensor.js'
import { benchCase, labelOf, type Row, type Run, round, withPeers } from './harness.js'
import { median, secondsOf } from './timing.js'

const PAGE = 64
const ITEMS = 100_000

interface Case {
  B: number
  history: number
  candidates: number
  /** Tokens of each history that are in pages. */
  cached: number
}

const cases: Case[] = [
  { B: 1, history: 7000, candidates: 2048, cached: 0 },
  { B: 32, history: 1024, candidates: 2048, cached: 0 },
  { B: 8, history: 4096, candidates: 256, cached: 0 },
  { B: 8, history: 4096, candidates: 256, cached: 3968 },
  { B: 1, history: 7000, candidates: 2048, cached: 6784 },
]
const MICROBATCH = 2048
const manyCandidates = [2048, 4096, 8192, 16_384]

function makeModel({ device, dtype }: Run, bias: boolean, small: boolean): GenerativeRanker {
  const config: GenerativeRankerConfig = {
    vocabulary: { users: 0, items: ITEMS, contextual: [], series: [] },
    actions: 4,
    tasks: [{ name: 'like', kind: 'binary' }],
    fusion: 'add',
    ...(small
      ? { dim: 32, layers: 2, heads: 2, qkDim: 16, vDim: 16 }
      : { dim: 512, layers: 5, heads: 4, qkDim: 128, vDim: 128 }),
    ...{ scalingSeqLen: 8192, positionBias: bias, timeBias: bias, inputDropout: 0, linearDropout: 0 },
  }
  return new GenerativeRanker(config, 0, { device, precision: dtype === 'bfloat16' ? 'bf16' : 'float32' })
}

/** B requests, whose histories, with the user's token, have `history` tokens; pages in a random order. */
function slotsOf({ B, history, candidates, cached }: Case, model: GenerativeRanker): Slot[] {
  const random = new Random(1)
  const encoder = { config: model.config, vocabularies: [null, null], unknownIds: 'unknown-row' as const }
  const each = Math.ceil(history / PAGE)
  const pages = random.shuffle(Array.from({ length: B * each }, (_, k) => k))
  return Array.from({ length: B }, (_, b) => {
    let time = 1_600_000_000
    const rows = history - 1
    const request = encodeRequest(
      {
        ...{ tenant: '', user: `${b}`, start: 0, context: [], series: new Uint8Array(rows) },
        items: BigInt64Array.from({ length: rows }, () => BigInt(random.int(ITEMS))),
        times: BigInt64Array.from({ length: rows }, () =>
          BigInt((time += Math.floor(600 * Math.exp(2 * random.normal())))),
        ),
        actions: Int32Array.from({ length: rows }, () => random.int(16)),
        candidates: BigInt64Array.from({ length: candidates }, () => BigInt(random.int(ITEMS))),
        time: BigInt(time + 60),
      },
      encoder,
    )
    // No vocabulary: ids are rows of the table.
    for (const ids of [request.content.subarray(1), request.candidates])
      for (let i = 0; i < ids.length; i++) ids[i] = BigInt(random.int(ITEMS))
    return { request, pages: Int32Array.from(pages.slice(b * each, (b + 1) * each)), cached, stored: cached }
  })
}

/** Seconds of device time of one pass over all of the slots. */
function deviceTime(slots: readonly Slot[], falcon: Falcon, inference: RankerInference, { device }: Run): number {
  const parts = slots.map((slot, index) => ({
    slot,
    index,
    from: slot.cached,
    first: 0,
    end: slot.request.candidates.length,
  }))
  return scope(() => {
    const shape = shapeOf(parts, inference)
    const { words, numbers } = fillPass(parts, shape, inference)
    const on = [words, numbers].map(data => Tensor.from(data, undefined, { device })) as [Tensor, Tensor]
    const graph = captureGraph(
      () => {
        const { inputs, layers } = bindPass(...on, shape, inference, falcon.pages)
        return inference.run(inputs, layers, null).logits
      },
      { device },
    )
    try {
      return secondsOf('falcon', () => void graph.replay(), device)
    } finally {
      graph.dispose()
    }
  })
}

async function wallTime(slots: readonly Slot[], falcon: Falcon, microbatch: number, repeats: number): Promise<number> {
  const took: number[] = []
  for (let i = 0; i < repeats + 3; i++) {
    const begin = performance.now()
    await falcon.score(slots, { microbatch })
    if (i >= 3) took.push(performance.now() - begin)
  }
  return median(took) / 1e3
}

async function rowsOf(run: Run): Promise<Row[]> {
  const { device, dtype, options } = run
  const small = device === 'cpu'
  const rows: Row[] = []
  for (const bias of [false, true]) {
    const model = makeModel(run, bias, small)
    const inferences = [true, false].map(deterministic => new RankerInference(model, null, deterministic))
    const runs = cases.flatMap(full =>
      inferences.slice(0, full.cached > 0 ? 2 : 1).map(inference => ({ full, inference })),
    )
    for (const { full, inference } of runs) {
      const { deterministic } = inference
      const c = small
        ? { B: full.B, history: full.history >> 6, candidates: full.candidates >> 6, cached: full.cached >> 6 }
        : full
      const falcon = new Falcon(model, null, PAGE, c.B * Math.ceil(c.history / PAGE), { deterministic })
      const slots = slotsOf(c, model)
      await falcon.score(
        slots.map(slot => ({ ...slot, cached: 0, stored: 0 })),
        { microbatch: Infinity },
      )
      const ms = round(1e3 * deviceTime(slots, falcon, inference, run))
      const wall = round(1e3 * (await wallTime(slots, falcon, Infinity, small ? 3 : 25)))
      falcon.dispose()
      const { dim: d, layers, heads: H, qkDim: D } = model.config
      const key = {
        case: 'rank',
        layers,
        d,
        H,
        D,
        B: c.B,
        history: c.history,
        candidates: c.candidates,
        dtype: labelOf(dtype),
      }
      const row: Row = {
        ...key,
        cached: c.cached,
        bias: bias ? 'position and time' : 'none',
        deterministic,
        unit: 'ms',
        ms,
        hstu: ms,
        wall,
      }
      rows.push(withPeers(row, {}, run, c.cached === 0 && !bias ? key : undefined))
    }
    if (!small || options.save) rows.push(...(await manyRows(run, model, small, bias)))
    for (const inference of inferences) inference.dispose()
    model.dispose()
  }
  return rows
}

/** One user with ever more candidates, in microbatches, the history cached. */
async function manyRows(
  { device, dtype }: Run,
  model: GenerativeRanker,
  small: boolean,
  bias: boolean,
): Promise<Row[]> {
  const rows: Row[] = []
  const [history, cached] = small ? [112, 64] : [7000, 6976]
  for (const many of manyCandidates) {
    const candidates = small ? many >> 6 : many
    const falcon = new Falcon(model, null, PAGE, Math.ceil(history / PAGE))
    const slots = slotsOf({ B: 1, history, candidates, cached }, model)
    await falcon.score(
      slots.map(slot => ({ ...slot, cached: 0, stored: 0 })),
      { microbatch: 64 },
    )
    const microbatch = small ? MICROBATCH >> 6 : MICROBATCH
    const wall = round(1e3 * (await wallTime(slots, falcon, microbatch, small ? 3 : 10)))
    const { used } = memory(device)
    falcon.dispose()
    const shape = { case: 'rank.microbatches', B: 1, history: historyTokens(slots[0]!.request), candidates, microbatch }
    rows.push({
      ...shape,
      cached,
      bias: bias ? 'position and time' : 'none',
      dtype: labelOf(dtype),
      unit: 'ms',
      ms: wall,
      hstu: wall,
      MiB: round(used / 2 ** 20),
    })
  }
  return rows
}

/**
 * A request batch through M-FALCON, from ids to logits: embeddings, 5 layers, head; cold and with 97 % of each history in pages, these in
 * both modes. `hstu` is device time of one pass, `wall` what a call of `Falcon.score` takes with assembly, copies and read-back. The peer is
 * the layers alone, under a CUDA graph.
 */
benchCase('falcon', { dtypes: ['bfloat16'], run: rowsOf })
