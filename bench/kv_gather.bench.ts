import { kvGather } from '#lib/ops/kv_gather.js'
import { int32, offsets } from '../test/harness.js'
import { benchOp, normal } from './harness.js'

const every = (B: number, n: number) => Array.from({ length: B }, () => n)

benchOp('kv_gather', {
  cases: [
    { case: 'history', B: 8, L: 4096, H: 4, D: 128, S: 64 },
    { case: 'model of d 50', B: 64, L: 200, H: 1, D: 50, S: 64 },
  ],
  inputs: ({ B, L, H, D, S }, random) => {
    const each = Math.ceil(L / S)
    return {
      pages: normal(random, [B * each, 2, S, H, D]),
      seqOffsets: offsets(every(B, L)),
      pageTable: int32(random.shuffle(Array.from({ length: B * each }, (_, i) => i))),
      pageOffsets: offsets(every(B, each)),
      kvLengths: int32(every(B, L)),
    }
  },
  run: (t, { B, L, D }) => {
    const paged = { pages: t.pages!, pageTable: t.pageTable!, pageOffsets: t.pageOffsets!, kvLengths: t.kvLengths! }
    const { k, v } = kvGather(paged, { seqOffsets: t.seqOffsets!, rows: B * L, keyDim: D, valueDim: D })
    return [k, v]
  },
  bytes: ({ B, L, H, D }, F) => 4 * F * B * L * H * D,
})
