import { itemCounts, type SequenceDataset } from './dataset.js'

/** Facts about a dataset as plain JSON. */
export interface DatasetReport {
  name: string
  users: number
  items: number
  actions: number
  /** Actions a user. */
  length: { min: number; mean: number; median: number; max: number }
  /** Users by number of actions, in bins `from .. to` of powers of two, both ends included. */
  lengthHistogram: { from: number; to: number; users: number }[]
  /** Seconds; null without times. */
  time: { first: number; last: number; days: number; equalNeighbours: number } | null
  /** actions / (users * items); above 1 only if users repeat items. */
  density: number
  /** Inequality of the items' counts: 0 if all are equally popular, towards 1 if few have everything. */
  popularityGini: number
  popularItems: { id: string; count: number; share: number }[]
  rating: { min: number; mean: number; max: number } | null
  stats: SequenceDataset['stats']
}

/** Describes `dataset`; `top` is how many popular items are listed. */
export function inspectDataset(dataset: SequenceDataset, top = 10): DatasetReport {
  const { offsets, numUsers, numItems } = dataset
  const actions = dataset.items.length
  const lengths = new Int32Array(numUsers)
  for (let u = 0; u < numUsers; u++) lengths[u] = offsets[u + 1]! - offsets[u]!
  lengths.sort()
  const counts = itemCounts(dataset)
  const order = Array.from({ length: numItems }, (_, i) => i + 1).sort((x, y) => counts[y]! - counts[x]! || x - y)
  return {
    name: dataset.name,
    users: numUsers,
    items: numItems,
    actions,
    length: {
      min: lengths[0] ?? 0,
      mean: numUsers === 0 ? 0 : actions / numUsers,
      median: numUsers === 0 ? 0 : (lengths[(numUsers - 1) >> 1]! + lengths[numUsers >> 1]!) / 2,
      max: lengths[numUsers - 1] ?? 0,
    },
    lengthHistogram: histogram(lengths),
    time: timeFacts(dataset),
    density: numUsers === 0 || numItems === 0 ? 0 : actions / (numUsers * numItems),
    popularityGini: gini(counts.subarray(1)),
    popularItems: order.slice(0, top).map(item => ({
      id: dataset.itemIds[item]!,
      count: counts[item]!,
      share: counts[item]! / actions,
    })),
    rating: ratingFacts(dataset.ratings),
    stats: dataset.stats,
  }
}

function histogram(sorted: Int32Array): DatasetReport['lengthHistogram'] {
  const bins: DatasetReport['lengthHistogram'] = []
  for (const length of sorted) {
    const from = length < 1 ? 0 : 2 ** Math.floor(Math.log2(length))
    const last = bins.at(-1)
    if (last?.from === from) last.users++
    else bins.push({ from, to: Math.max(0, 2 * from - 1), users: 1 })
  }
  return bins
}

function timeFacts(dataset: SequenceDataset): DatasetReport['time'] {
  const { times, offsets, numUsers } = dataset
  if (!times || times.length === 0) return null
  let first = times[0]!
  let last = times[0]!
  let equal = 0
  for (const time of times) {
    if (time < first) first = time
    if (time > last) last = time
  }
  for (let u = 0; u < numUsers; u++) {
    for (let row = offsets[u]! + 1; row < offsets[u + 1]!; row++) if (times[row] === times[row - 1]) equal++
  }
  const pairs = times.length - numUsers
  return {
    first: Number(first),
    last: Number(last),
    days: Number(last - first) / 86_400,
    equalNeighbours: pairs > 0 ? equal / pairs : 0,
  }
}

function gini(counts: Float64Array): number {
  const sorted = counts.slice().sort()
  let sum = 0
  let weighted = 0
  for (let i = 0; i < sorted.length; i++) {
    sum += sorted[i]!
    weighted += (i + 1) * sorted[i]!
  }
  return sum === 0 ? 0 : (2 * weighted) / (sorted.length * sum) - (sorted.length + 1) / sorted.length
}

function ratingFacts(ratings: Float32Array | null): DatasetReport['rating'] {
  if (!ratings || ratings.length === 0) return null
  let min = ratings[0]!
  let max = ratings[0]!
  let sum = 0
  for (const rating of ratings) {
    min = Math.min(min, rating)
    max = Math.max(max, rating)
    sum += rating
  }
  return { min, mean: sum / ratings.length, max }
}
