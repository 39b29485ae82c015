import { afterAll, describe, expect, it } from 'vitest'
import { memory } from '#lib/tensor.js'
import { forms } from './requests.js'
import { disposeModels, runScenario, scenarios } from './scenarios.js'

const before = memory()
afterAll(() => {
  disposeModels()
  expect(memory()).toEqual(before)
})

describe('M-FALCON', () => {
  it.each(Object.keys(forms))('gives each candidate the bits that it has alone: %s', async form => {
    let compared = 0
    for (const scenario of scenarios(336).filter(one => one.form === form)) compared += await runScenario(scenario)
    expect(compared).toBeGreaterThan(400)
  })
})
