import { describe, expect, it } from 'vitest'
import { Random } from '#lib/random.js'
import { encodeRequest } from '#lib/serve/encode.js'
import { idsBegin, idText, sameIds, textIds } from '#lib/serve/ids.js'
import type { Waiting } from '#lib/serve/queue.js'
import { ownerText, type RankRequest } from '#lib/serve/request.js'
import { RecentHistories, RequestEncoder } from '#lib/serve/request_encoder.js'
import { Vocabulary } from '#lib/serve/vocabulary.js'
import { forms, grow, randomRequest, stirred, wireOf } from './requests.js'

const waitingOf = (request: RankRequest): Waiting => ({
  ...{ id: 1, wire: wireOf(request), tokens: 1, enqueued: 0, deadline: null, cancelled: false },
})

describe('ids as they cross threads', () => {
  const texts = ['', 'a', '\u0000', 'ä', '日本', '\ud800', '12', '-3', 'x'.repeat(300_000)]

  it('are the texts, whatever these hold', () => {
    const ids = textIds(texts)!
    expect(texts.map((_, i) => idText(ids, i))).toEqual(texts)
    expect(textIds(['a', 3])).toBeNull()
    const vocabulary = new Vocabulary('item', texts)
    expect([...vocabulary.numbersOf(ids)]).toEqual(texts.map((_, i) => i + 1))
    expect([...vocabulary.numbersOf(ids, 7)]).toEqual([8, 9])
    expect(['b', 'aa', '\u0000\u0000', '\ud801'].map(id => vocabulary.numberOf(id))).toEqual([0, 0, 0, 0])
    expect(() => new Vocabulary('item', [...texts, 'ä'])).toThrow(/entry 9: "ä" is no new text/)
  })

  it('are numbers where all of them are, found by their digits', () => {
    const numbers = [0n, 7n, -3n, 2n ** 53n, -(2n ** 63n), 2n ** 63n - 1n, 9_007_199_254_740_991n, 1234567890123n]
    const vocabulary = new Vocabulary('item', numbers.map(String))
    const ids = BigInt64Array.from(numbers)
    expect([...vocabulary.numbersOf(ids)]).toEqual(numbers.map((_, i) => i + 1))
    expect(numbers.map((_, i) => idText(ids, i))).toEqual(numbers.map(String))
    expect([...vocabulary.numbersOf(BigInt64Array.of(8n, 7n))]).toEqual([0, 2])
  })

  it('are found among many, some of which are alike, and never outside of what was given', () => {
    const random = new Random('vocabulary')
    const text = () => String.fromCharCode(...Array.from({ length: random.int(14) }, () => 48 + random.int(3)))
    const known = [...new Set(Array.from({ length: 3000 }, text))]
    const numbers = new Map(known.map((id, k) => [id, k + 1]))
    const vocabulary = new Vocabulary('item', known)
    const asked = Array.from({ length: 5000 }, text)
    const wanted = asked.map(id => numbers.get(id) ?? 0)
    expect([...vocabulary.numbersOf(textIds(asked)!)]).toEqual(wanted)
    expect([...vocabulary.numbersOf(textIds(asked)!, 130)]).toEqual(wanted.slice(130))
    expect(vocabulary.numbersOf(textIds(asked)!, 5000).length).toBe(0)
    expect([...new Vocabulary('none', []).numbersOf(textIds(['', 'a'])!)]).toEqual([0, 0])
    const bad = (units: number, ...ends: number[]) => {
      return () => vocabulary.numbersOf({ units: new Uint16Array(units), ends: Int32Array.from(ends) })
    }
    for (const wrong of [bad(3, 2, 1), bad(3, 4), bad(3, -1), bad(0, 1)])
      expect(wrong).toThrow(expect.objectContaining({ code: 'ERR_HSTU_INVALID_ARGUMENT' }))
    expect(() => vocabulary.numbersOf(textIds(['a'])!, 2)).toThrow(/Invalid typed array length/)
  })

  it('are compared one by one', () => {
    const all = textIds(['ab', 'c', 'd'])!
    expect([textIds(['ab', 'c'])!, textIds([])!, all].map(first => idsBegin(all, first))).toEqual([true, true, true])
    expect([textIds(['a', 'bc'])!, textIds(['ab', 'd'])!].map(first => idsBegin(all, first))).toEqual([false, false])
    expect(idsBegin(textIds(['ab'])!, all)).toBe(false)
    expect(idsBegin(all, BigInt64Array.of(1n))).toBe(false)
    expect(idsBegin(BigInt64Array.of(1n, 2n), BigInt64Array.of(1n))).toBe(true)
    expect(sameIds(BigInt64Array.of(1n, 2n), BigInt64Array.of(1n))).toBe(false)
  })
})

describe('requests of known users', () => {
  it.each(Object.keys(forms))('are encoded as those of others: %s', form => {
    const { model, table, encoder } = stirred(forms[form]!)
    model.dispose()
    table?.dispose()
    const random = new Random(`encode ${form}`)
    const requests = new RequestEncoder(encoder, null)
    for (let user = 0; user < 6; user++) {
      let request = randomRequest(random, random.int(60), 5)
      for (let round = 0; round < 12; round++) {
        const waiting = waitingOf(request)
        if (random.int(2)) requests.prepare(waiting)
        expect(requests.encoded(waiting)).toEqual(encodeRequest(wireOf(request), encoder))
        const { history } = request
        const dice = random.int(6)
        if (dice < 3) request = { ...request, history: grow(random, history, random.int(9)), candidates: ['3', '65'] }
        else if (dice === 3)
          request = { ...request, history: grow(random, { ...history, items: [], times: [], actions: [], series: [] }, 7) } // biome-ignore format: one line
        else if (dice === 4) request = { ...request, context: { country: `c${1 + random.int(4)}` } }
        else request = { ...request, history: { ...history, start: (history.start ?? 0) + 1 } }
      }
    }
  })

  it('are forgotten when told to, by age, and for room', async () => {
    const { model, encoder } = stirred({})
    model.dispose()
    const recent = new RecentHistories(20)
    const random = new Random(3)
    const wires = Array.from({ length: 3 }, (_, u) => wireOf({ ...randomRequest(random, 30, 2), user: `${u}` }))
    const keep = (recent: RecentHistories) => {
      for (const wire of wires) recent.keep(ownerText(wire), wire, encodeRequest(wire, encoder))
    }
    const found = (recent: RecentHistories) => wires.map(wire => recent.find(ownerText(wire), wire) !== null)
    keep(recent)
    expect(found(recent)).toEqual([true, true, true])
    recent.forget(ownerText(wires[1]!))
    expect(found(recent)).toEqual([true, false, true])
    await new Promise(resolve => setTimeout(resolve, 30))
    expect(found(recent)).toEqual([false, false, false])
    const small = new RecentHistories(null, 130)
    keep(small)
    expect(found(small)).toEqual([false, true, true])
    expect(JSON.stringify(small.find(ownerText(wires[2]!), wires[2]!)!.wire, (_, x) => (typeof x === 'bigint' ? `${x}` : x))).not.toMatch(/candidates/) // biome-ignore format: one line
  })
})
