import { emptyHashIndex, type HashIndex, hashLookup } from '#lib/ops/hash_lookup.js'
import type { Random } from '#lib/random.js'
import { int64 } from '../test/harness.js'
import { benchOp } from './harness.js'

const keyOf = (n: number) => BigInt.asIntN(64, BigInt(n + 1) * 0x9e3779b97f4a7c15n)
const some = (random: Random, count: number, of: number) =>
  int64(Array.from({ length: count }, () => keyOf(Math.floor(of * random.float() ** 3))))

/** Of the case under way; the scope of a case frees it. */
let index: HashIndex | null = null

benchOp('hash_lookup', {
  cases: [
    { case: 'known keys', I: 1_000_000, T: 102_400, insert: false },
    { case: 'known keys, might insert', I: 1_000_000, T: 102_400, insert: true },
    { case: 'new keys, with a new index', I: 0, T: 102_400, insert: true },
  ],
  inputs: ({ I, T }, random) => ({
    known: int64(Array.from({ length: I }, (_, n) => keyOf(n))),
    keys: some(random, T, Math.max(I, 1_000_000)),
  }),
  run: (t, { I, T, insert }) => {
    if (I === 0 || !index || index.rowKeys.disposed) {
      index = emptyHashIndex(I + T + 1, t.keys!)
      if (I > 0) hashLookup(index, t.known!, { insert: true })
    }
    return hashLookup(index, t.keys!, { insert })
  },
  // A key, a slot, the row's key and the row.
  bytes: ({ T }) => (8 + 4 + 8 + 8) * T,
})
