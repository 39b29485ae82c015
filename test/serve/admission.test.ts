import { describe, expect, it, vi } from 'vitest'
import { onceAborted } from '#lib/serve/aborts.js'
import { Admission } from '#lib/serve/admission.js'
import { Awake } from '#lib/serve/awake.js'
import { Pace } from '#lib/serve/pace.js'
import { Turns } from '#lib/serve/turns.js'

const turn = () => new Promise(resolve => setImmediate(resolve))
const cost = { tokens: 100, bytes: 100 }

describe('Admission', () => {
  const admission = () => {
    const made = new Admission({ requests: 10, tokens: 10_000, bytes: 10_000 })
    made.msPerToken = 0.1
    made.count(cost, 1)
    return made
  }
  const refused = expect.objectContaining({ code: 'ERR_HSTU_OVERLOADED', retryAfterMs: expect.any(Number) })

  it('refuses what would be late by its estimate, and by how much longer than that answers took', () => {
    const own = admission()
    expect(own.expectedMs(100)).toBe(20)
    own.check(cost, { deadlineMs: 30 })
    expect(() => own.check(cost, { deadlineMs: 25 })).toThrow(refused)
    own.check(cost, { deadlineMs: 60 })
    for (let late = 0; late < 50; late++) own.learn(Infinity)
    expect(() => own.check(cost, { deadlineMs: 60 })).toThrow(refused)
    own.check(cost, {})
    own.check(cost, { deadlineMs: 100 })
    own.count(cost, -1)
    own.check(cost, { deadlineMs: 60 }) // nothing else is at hand: not late for the queue's sake
  })

  it('learns a margin that nineteen of twenty answers keep', () => {
    const own = admission()
    for (let k = 0; k < 20_000; k++) own.learn(k % 100)
    expect(own.marginMs).toBeGreaterThan(90)
    expect(own.marginMs).toBeLessThan(100)
    for (let k = 0; k < 20_000; k++) own.learn(0)
    expect(own.marginMs).toBe(0)
  })
})

describe('Pace', () => {
  it('is known when a batch is told of, counts the time between batches that follow one another, and is smoothed', () => {
    const pace = new Pace()
    pace.begin(100)
    pace.settle(4)
    pace.settle(6)
    pace.measure(120)
    expect(pace.msPerToken).toBe(2)
    pace.measure(130) // nothing more was done
    expect(pace.msPerToken).toBe(2)
    pace.end(true)
    pace.begin(150)
    pace.settle(10)
    pace.measure(160)
    expect(pace.msPerToken).toBeCloseTo(0.8 * 2 + 0.2 * 4)
    pace.end(false)
    pace.begin(1000)
    pace.settle(10)
    pace.measure(1010)
    expect(pace.msPerToken).toBeCloseTo(0.8 * 2.4 + 0.2 * 1)
    pace.giveWay()
    expect(pace.msPerToken).toBeCloseTo(0.98 * 2.12)
  })
})

describe('onceAborted', () => {
  it('puts one listener on a signal, and calls all that were not taken back', () => {
    const [own, other] = [new AbortController(), new AbortController()]
    const [add, remove] = [vi.spyOn(own.signal, 'addEventListener'), vi.spyOn(own.signal, 'removeEventListener')]
    const called: number[] = []
    const forget = Array.from({ length: 30 }, (_, k) => onceAborted(own.signal, () => called.push(k)))
    expect(add.mock.calls.length).toBe(1)
    for (const k of [3, 3, 5]) forget[k]!()
    own.abort()
    expect(called).toEqual(Array.from({ length: 30 }, (_, k) => k).filter(k => k !== 3 && k !== 5))
    forget[0]!()
    expect(remove.mock.calls.length).toBe(0)
    const taken = vi.spyOn(other.signal, 'removeEventListener')
    const back = onceAborted(other.signal, () => called.push(-1))
    back()
    back()
    other.abort()
    expect(taken.mock.calls.length).toBe(1)
    expect(called).not.toContain(-1)
  })
})

describe('Turns', () => {
  it('hands on a few in a turn of the event loop, in order, the first at once', async () => {
    const seen: number[] = []
    const turns = new Turns<number>(one => seen.push(one))
    turns.add(...Array.from({ length: 20 }, (_, k) => k))
    expect(seen.length).toBe(16)
    turns.add(20, 21)
    expect(seen.length).toBe(16)
    await turn()
    expect(seen).toEqual(Array.from({ length: 22 }, (_, k) => k))
    await turn()
    turns.add(...Array.from({ length: 40 }, (_, k) => 22 + k))
    expect(seen.length).toBe(38)
    turns.handOnAll()
    expect(seen).toEqual(Array.from({ length: 62 }, (_, k) => k))
  })
})

describe('Awake', () => {
  it('turns the event loop until nothing is waited for, or its time is over', async () => {
    let waits = true
    const asked = vi.fn(() => waits)
    const awake = new Awake(asked, 50)
    awake.stay()
    awake.stay()
    for (let k = 0; k < 5; k++) await turn()
    expect(asked.mock.calls.length).toBeGreaterThanOrEqual(4)
    expect(asked.mock.calls.length).toBeLessThanOrEqual(6)
    waits = false
    await turn()
    await turn()
    const { length } = asked.mock.calls
    await turn()
    expect(asked.mock.calls.length).toBe(length)
    waits = true
    new Awake(asked, 0).stay()
    await turn()
    await turn()
    expect(asked.mock.calls.length).toBe(length)
  })
})
