import { check } from '../errors.js'
import { Random } from '../random.js'
import { itemCounts, type SequenceDataset } from './dataset.js'

export interface SyntheticOptions {
  /** Default 2,000; the paper's size is 20,000. */
  numItems?: number
  /** Default 50; the paper's size is 100. */
  numCategories?: number
  /** Actions a record; default 64, in the paper 128. */
  recordLength?: number
  /** Default 40,000 */
  numRecords?: number
  seed?: number | string
  /** Whether actions have times; default false. The items do not depend on it. */
  times?: boolean
}

/** Hit rates on the test records' last position, among all items. */
export interface HitRates {
  hr10: number
  hr50: number
}

export interface OracleReport extends HitRates {
  /** The same on the targets that were drawn, what a model is measured on; `hr10` and `hr50` are expectations. */
  drawnHr10: number
  drawnHr50: number
}

/** @see syntheticStream */
export interface SyntheticStream {
  /** One "user" a record, in the order of the stream. */
  dataset: SequenceDataset
  /** [numItems + 1] category of each item; -1 for padding. */
  categoryOf: Int32Array
  /** First 90 % of the records: train on every position, one pass in order (`trainBatch` with `protocol: 'all'`). */
  trainRecords: Int32Array
  /** Last 10 %: test at the last position alone (`evalBatch` with `stage: 'test'`, `filterSeen: 'none'`). */
  testRecords: Int32Array
  /** What the best ranking without times reaches; a model that sees times may exceed it. */
  oracle(): OracleReport
  /** The oracle at any K: expected, and on the drawn targets. */
  oracleHitRate(k: number): { expected: number; drawn: number }
  /** Ranking by how often items occur in the training records; ties by item id. */
  popularity(): HitRates
}

const MAX_CATEGORIES = 5
const RELEASED_AT_START = 0.4
const TRAIN_SHARE = 0.9

/**
 * The synthetic preference stream, after appendix C of the HSTU paper (Zhai et al. 2024, "Actions Speak Louder than
 * Words"): non-stationary, for ids keep appearing.
 *
 * Each record draws one to five categories, a prior H over them (uniform on the simplex) and a ~ U(1, 500). Position k
 * (from 1) draws its category from H with probability a / (a + k - 1), else a category already used in proportion to
 * its count; then uniformly one of the category's items released so far. 40 % of the items are there at the start, the
 * rest is released linearly over the records, in order of their ids. An item's category is drawn uniformly, except that
 * the first `numCategories` items cover all of them, lest one be empty at the start.
 *
 * Do not compare with the paper's Table 2: the published description leaves too much open.
 *
 * @throws HstuError ERR_HSTU_INVALID_ARGUMENT for sizes that leave a category without an item at the start.
 */
export function syntheticStream(options: SyntheticOptions = {}): SyntheticStream {
  const { numItems = 2000, numCategories = 50, recordLength = 64, numRecords = 40_000, seed = 1 } = options
  for (const [name, value] of Object.entries({ numItems, numCategories, recordLength, numRecords })) {
    const valid = Number.isInteger(value) && value >= 1
    check(valid, 'ERR_HSTU_INVALID_ARGUMENT', () => `${name} must be a positive integer, got ${value}`)
  }
  check(
    Math.floor(numItems * RELEASED_AT_START) >= numCategories && recordLength >= 2 && numRecords >= 10,
    'ERR_HSTU_INVALID_ARGUMENT',
    () => 'numItems must be at least 2.5 numCategories, recordLength at least 2, numRecords at least 10',
  )
  const total = numRecords * recordLength
  check(total < 2 ** 31, 'ERR_HSTU_INVALID_ARGUMENT', () => `${total} actions, more than 2^31 - 1`)

  const root = new Random(seed)
  const random = root.fork('items')
  const items = new Int32Array(total)
  const firstTest = Math.floor(numRecords * TRAIN_SHARE)
  const states: TestState[] = []
  const categories = Int32Array.from({ length: numCategories }, (_, c) => c)
  const categoryOf = drawCategories(numItems, numCategories, root.fork('categories'))
  const members: number[][] = Array.from({ length: numCategories }, () => [])
  let nextItem = 1
  const used = new Int32Array(recordLength)
  const prior = new Float64Array(MAX_CATEGORIES)
  for (let r = 0; r < numRecords; r++) {
    for (const end = releasedItems(numItems, r, numRecords); nextItem <= end; nextItem++) {
      members[categoryOf[nextItem]!]!.push(nextItem)
    }
    const count = 1 + random.int(Math.min(MAX_CATEGORIES, numCategories))
    let sum = 0
    for (let j = 0; j < count; j++) {
      const other = j + random.int(numCategories - j)
      const swap = categories[j]!
      categories[j] = categories[other]!
      categories[other] = swap
      sum += prior[j] = -Math.log(1 - random.float())
    }
    for (let j = 0; j < count; j++) prior[j]! /= sum
    const a = 1 + 499 * random.float()
    for (let k = 0; k < recordLength; k++) {
      // Proportional to its count among the k positions before: the category of one of them.
      const fresh = random.float() * (a + k) < a
      const local = fresh ? pick(prior, count, random.float()) : used[random.int(k)]!
      used[k] = local
      const choice = members[categories[local]!]!
      items[r * recordLength + k] = choice[random.int(choice.length)]!
    }
    if (r >= firstTest) {
      const available = Array.from(categories.subarray(0, count), category => members[category]!.length)
      states.push(testState(available, prior, a, used, recordLength))
    }
  }
  const times = options.times ? rhythm(items, categoryOf, recordLength, root.fork('times')) : null
  const dataset = asDataset(items, times, numItems, recordLength, numRecords)
  const trainRecords = Int32Array.from({ length: firstTest }, (_, r) => r)
  const testRecords = Int32Array.from({ length: numRecords - firstTest }, (_, r) => firstTest + r)
  const oracleHitRate = (k: number) => {
    let expected = 0
    let drawn = 0
    for (const state of states) {
      const hit = oracleHit(state, k)
      expected += hit.expected
      drawn += hit.drawn
    }
    return { expected: expected / states.length, drawn: drawn / states.length }
  }
  return {
    dataset,
    categoryOf,
    trainRecords,
    testRecords,
    oracleHitRate,
    oracle() {
      const at10 = oracleHitRate(10)
      const at50 = oracleHitRate(50)
      return { hr10: at10.expected, hr50: at50.expected, drawnHr10: at10.drawn, drawnHr50: at50.drawn }
    },
    popularity: () => popularityHitRates(dataset, firstTest),
  }
}

/** Categories of a test record at its last position, the most probable item first. */
interface TestState {
  /** P(category | generator's state) */
  probability: number[]
  /** Items of the category that are released. */
  available: number[]
  /** Which of them the target came from. */
  target: number
}

function testState(available: number[], prior: Float64Array, a: number, used: Int32Array, length: number): TestState {
  const counts = new Float64Array(available.length)
  for (let k = 0; k < length - 1; k++) counts[used[k]!]!++
  const all = available
    .map((n, j) => ({ j, n, p: (a * prior[j]! + counts[j]!) / (a + length - 1) }))
    .sort((x, y) => y.p / y.n - x.p / x.n)
  return {
    probability: all.map(x => x.p),
    available: all.map(x => x.n),
    target: all.findIndex(x => x.j === used[length - 1]!),
  }
}

/** Items of one category tie; each of them is in the top K with the same chance. */
function oracleHit(state: TestState, k: number): { expected: number; drawn: number } {
  let left = k
  let expected = 0
  let drawn = 0
  for (let j = 0; j < state.probability.length && left > 0; j++) {
    const share = Math.min(1, left / state.available[j]!)
    expected += state.probability[j]! * share
    if (j === state.target) drawn = share
    left -= state.available[j]!
  }
  return { expected, drawn }
}

function popularityHitRates(dataset: SequenceDataset, firstTest: number): HitRates {
  const train = { ...dataset, numUsers: firstTest }
  const counts = itemCounts(train)
  const order = Array.from({ length: dataset.numItems }, (_, i) => i + 1).sort(
    (x, y) => counts[y]! - counts[x]! || x - y,
  )
  const rank = new Int32Array(dataset.numItems + 1)
  order.forEach((item, k) => {
    rank[item] = k + 1
  })
  let at10 = 0
  let at50 = 0
  for (let r = firstTest; r < dataset.numUsers; r++) {
    const place = rank[dataset.items[dataset.offsets[r + 1]! - 1]!]!
    if (place <= 10) at10++
    if (place <= 50) at50++
  }
  const tests = dataset.numUsers - firstTest
  return { hr10: at10 / tests, hr50: at50 / tests }
}

function releasedItems(numItems: number, record: number, numRecords: number): number {
  return Math.floor(numItems * (RELEASED_AT_START + ((1 - RELEASED_AT_START) * record) / Math.max(1, numRecords - 1)))
}

/** [numItems + 1]; -1 for padding. */
function drawCategories(numItems: number, numCategories: number, random: Random): Int32Array {
  const categoryOf = new Int32Array(numItems + 1)
  categoryOf[0] = -1
  for (let i = 1; i <= numItems; i++) categoryOf[i] = i <= numCategories ? i - 1 : random.int(numCategories)
  return categoryOf
}

function pick(prior: Float64Array, count: number, x: number): number {
  let left = x
  for (let j = 0; j < count - 1; j++) {
    left -= prior[j]!
    if (left < 0) return j
  }
  return count - 1
}

const HOUR = 3600
const DAY = 24 * HOUR

/**
 * Times to learn from: a category has its hour of the day, and every other one is for weekends only. A change of
 * category waits for the next such moment; actions of one category follow each other in a burst, seconds to minutes
 * apart. So the gap before an action tells whether the category stays, and the hour which one it is.
 */
function rhythm(items: Int32Array, categoryOf: Int32Array, length: number, random: Random): BigInt64Array {
  const times = new BigInt64Array(items.length)
  const words = new Int32Array(times.buffer)
  const start = 1_600_041_600 // a Monday at midnight, UTC
  for (let row = 0, now = 0, last = -1; row < items.length; row++) {
    if (row % length === 0) {
      now = start + Math.floor((row / items.length) * 28 * DAY)
      last = -1
    }
    const category = categoryOf[items[row]!]!
    if (category === last) {
      now += 5 - Math.floor(90 * Math.log(1 - random.float()))
    } else {
      let moment = Math.floor(now / DAY) * DAY + ((category * 7) % 24) * HOUR + random.int(HOUR)
      const weekend = category % 2 === 1
      while (moment <= now || (weekend && Math.floor((moment - start) / DAY) % 7 < 5)) moment += DAY
      now = moment
    }
    last = category
    words[2 * row] = now
    words[2 * row + 1] = now >= 2 ** 32 ? Math.floor(now / 2 ** 32) : 0
  }
  return times
}

function asDataset(
  items: Int32Array,
  times: BigInt64Array | null,
  numItems: number,
  recordLength: number,
  numRecords: number,
): SequenceDataset {
  return {
    name: 'synthetic',
    numUsers: numRecords,
    numItems,
    userIds: Array.from({ length: numRecords }, (_, r) => String(r)),
    itemIds: Array.from({ length: numItems + 1 }, (_, i) => (i === 0 ? '' : String(i))),
    offsets: Int32Array.from({ length: numRecords + 1 }, (_, r) => r * recordLength),
    items,
    times,
    ratings: null,
    stats: {
      rows: items.length,
      skippedUsers: 0,
      skippedActions: 0,
      outOfOrder: 0,
      minActions: recordLength,
      warnings: [],
    },
  }
}
