// M-FALCON in 315 random scenarios on each backend: rows of `hstu selftest` too.
import { deepStrictEqual, ok } from 'node:assert/strict'
import type { ModelOptions } from '#lib/models/sequence_model.js'
import { memory } from '#lib/tensor.js'
import { itOp } from '../harness.js'
import { forms } from './requests.js'
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
