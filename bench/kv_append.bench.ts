import { kvAppend } from '#lib/ops/kv_append.js'
import { int32, offsets } from '../test/harness.js'
import { benchOp, normal } from './harness.js'

const every = (B: number, n: number) => Array.from({ length: B }, () => n)

benchOp('kv_append', {
  cases: [
    { case: 'prefill', B: 8, held: 0, L: 4096, H: 4, D: 128, S: 64 },
    { case: 'delta', B: 32, held: 1000, L: 32, H: 4, D: 128, S: 64 },
    { case: 'model of d 50', B: 64, held: 0, L: 200, H: 1, D: 50, S: 64 },
  ],
  inputs: ({ B, held, L, H, D, S }, random) => {
    const each = Math.ceil((held + L) / S)
    return {
      pages: normal(random, [B * each, 2, S, H, D]),
      k: normal(random, [B * L, H, D]),
      v: normal(random, [B * L, H, D]),
      seqOffsets: offsets(every(B, L)),
      pageTable: int32(random.shuffle(Array.from({ length: B * each }, (_, i) => i))),
      pageOffsets: offsets(every(B, each)),
      kvLengths: int32(every(B, held)),
    }
  },
  run: t => {
    const paged = { pages: t.pages!, pageTable: t.pageTable!, pageOffsets: t.pageOffsets!, kvLengths: t.kvLengths! }
    kvAppend(t.k!, t.v!, { seqOffsets: t.seqOffsets!, paged })
    return t.pages!
  },
  bytes: ({ B, L, H, D }, F) => 4 * F * B * L * H * D,
})
