import { globalNormClip } from '#lib/ops/global_norm_clip.js'
import { benchOp, normal } from './harness.js'

benchOp('global_norm_clip', {
  cases: [
    { case: 'one table', tensors: 1, size: 30_000_000 },
    { case: 'a model', tensors: 40, size: 25_000 },
  ],
  inputs: ({ tensors, size }, random) => ({ g: normal(random, [tensors, size]) }),
  // Measures alone: what scales would have nothing left to scale on the second call.
  run: (t, { tensors }) => {
    const grads = Array.from({ length: tensors }, (_, i) => t.g!.rows(i, i + 1))
    return globalNormClip(grads, Number.POSITIVE_INFINITY)
  },
  bytes: ({ tensors, size }, F) => F * tensors * size,
})
