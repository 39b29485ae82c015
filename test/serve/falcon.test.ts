// M-FALCON in 315 random scenarios on each backend: rows of `hstu selftest` too.
import { deepStrictEqual, ok } from 'node:assert/strict'
import type { ModelOptions } from '#lib/models/sequence_model.js'
import { Random } from '#lib/random.js'
import { encodeRequest, historyTokens } from '#lib/serve/encode.js'
import { Falcon } from '#lib/serve/falcon.js'
import type { Slot } from '#lib/serve/pass.js'
import { memory } from '#lib/tensor.js'
import { itOp } from '../harness.js'
import { forms, randomRequest, stirred, wireOf } from './requests.js'
import { runScenario, Stage, scenarios } from './scenarios.js'

const COUNT = 315

async function check(form: string, options: ModelOptions): Promise<void> {
  const before = memory()
  const stage = new Stage(form, options)
  let compared = 0
  try {
    for (const scenario of scenarios(COUNT)) if (scenario.form === form) compared += await runScenario(scenario, stage)
  } finally {
    stage[Symbol.dispose]()
  }
  ok(compared > 300, `only ${compared} candidates were compared`)
  deepStrictEqual(memory(), before, 'memory() before and after')
}

for (const form of Object.keys(forms)) {
  itOp('falcon', `gives each candidate the bits that it has alone: ${form}`, () => check(form, {}))
  for (const precision of ['float32', 'bf16'] as const)
    itOp('falcon', `so in ${precision}: ${form}`, () => check(form, { device: 'cuda', precision }), 'cuda')
}

/** Passes in both modes, cold and with most of the histories in pages. @param tolerance relative, of all logits of a pass */
async function checkModes(rows: readonly number[], tolerance: number, options: ModelOptions): Promise<void> {
  const before = memory()
  for (const bias of [true, false]) {
    const heads = { layers: 2, heads: 2, qkDim: 128, vDim: 128, positionBias: bias, timeBias: bias }
    const { model, table, encoder } = stirred(heads, options)
    const random = new Random('both modes')
    const requests = rows.map(count => encodeRequest(wireOf(randomRequest(random, count, 30)), encoder))
    const pages = requests.map(request => Math.ceil(historyTokens(request) / 64))
    const first = pages.map((_, b) => pages.slice(0, b).reduce((sum, n) => sum + n, 0))
    const engines = [true, false].map(deterministic => {
      return new Falcon(model, table, 64, first.at(-1)! + pages.at(-1)!, { deterministic, sightings: 1 })
    })
    for (const share of [0, 0.95, 0.95]) {
      const slots = requests.map((request, b): Slot => {
        const cached = Math.floor(share * pages[b]!) * 64
        return {
          request,
          pages: Int32Array.from({ length: pages[b]! }, (_, k) => first[b]! + k),
          stored: cached,
          cached,
        }
      })
      const [exact, found, again] = await Promise.all(
        [engines[0]!, engines[1]!, engines[1]!].map(async engine => {
          return (await engine.score(slots, { microbatch: Infinity })).logits.flatMap(logits => [...logits])
        }),
      )
      deepStrictEqual(again, found, 'the same from run to run')
      const error = Math.hypot(...exact!.map((x, i) => x - found![i]!)) / Math.hypot(...exact!)
      ok(error <= tolerance, `cached ${share}, bias ${bias}: relative error ${error}`)
    }
    for (const engine of engines) engine.dispose()
    model.dispose()
  }
  deepStrictEqual(memory(), before, 'memory() before and after')
}

itOp('falcon', 'gives the same bits in both modes', () => checkModes([70, 1, 200], 0, {}))
itOp(
  'falcon',
  'not deterministic: the same scores within twice the rounding of the dtype',
  () => checkModes([2500, 10, 900], 2 ** -7, { device: 'cuda', precision: 'bf16' }),
  'cuda',
)
