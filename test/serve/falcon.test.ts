import { afterAll, describe, expect, it } from 'vitest'
import type { Precision } from '#lib/layers/precision.js'
import { native } from '#lib/native.js'
import { memory } from '#lib/tensor.js'
import { forms } from './requests.js'
import { disposeModels, runScenario, scenarios } from './scenarios.js'

const before = memory()
afterAll(() => {
  disposeModels()
  expect(memory()).toEqual(before)
})

const { cuda } = native.backend()
const cudaScenarios = ['float32', 'bf16'].flatMap(precision =>
  Object.keys(forms).map(form => [precision, form] as const),
)

describe('M-FALCON', () => {
  it.skipIf(!cuda.usable).each(cudaScenarios)('does so on CUDA: %s, %s', async (precision, form) => {
    for (const scenario of scenarios(315).filter(one => one.form === form))
      await runScenario(scenario, { device: 'cuda', precision: precision as Precision })
  })

  it.each(Object.keys(forms))('gives each candidate the bits that it has alone: %s', async form => {
    let compared = 0
    for (const scenario of scenarios(315).filter(one => one.form === form)) compared += await runScenario(scenario)
    expect(compared).toBeGreaterThan(300)
  })
})
