import { GenerativeRanker, type GenerativeRankerConfig } from '../models/generative_ranker.js'
import { type BundleSchema, type RankerManifest, writeBundle } from './bundle.js'
import { goldenRequest, trainingLogits } from './golden.js'
import { checkRequest } from './request.js'
import { Vocabulary } from './vocabulary.js'

/** Rankers of random parameters: what serving costs does not depend on what a model has learned. */
export const syntheticSizes = {
  small: { dim: 32, layers: 2, heads: 2, qkDim: 16, vDim: 16 },
  large: { dim: 512, layers: 5, heads: 4, qkDim: 128, vDim: 128 },
} as const

/** Few enough that the CPU too has a table of what its encoders make of them. */
const ITEMS = 16_000
/** Ids are numbers, so that a load may give them as text or not. */
const FIRST_ID = 1_000_000
const MAX_HISTORY = 4096

/** Writes the bundle of a ranker that nobody trained: one token an event, four actions, one task, computed in bf16 on CUDA. */
export async function writeSyntheticBundle(folder: string, size: keyof typeof syntheticSizes): Promise<void> {
  const schema: BundleSchema = { actions: ['CLICK', 'LIKE', 'SHARE', 'HIDE'], contextual: [], series: [] }
  const architecture: GenerativeRankerConfig = {
    vocabulary: { users: 0, items: ITEMS, contextual: [], series: [] },
    ...{ actions: schema.actions.length, tasks: [{ name: 'like', kind: 'binary' }], fusion: 'add' },
    ...{ ...syntheticSizes[size], scalingSeqLen: 2 * MAX_HISTORY, inputDropout: 0, linearDropout: 0 },
  }
  const model = new GenerativeRanker(architecture, 0)
  try {
    const ids = Array.from({ length: ITEMS }, (_, k) => `${FIRST_ID + k}`)
    const request = goldenRequest(schema, [null, ids])
    const limits = { ...schema, maxHistory: MAX_HISTORY, maxCandidates: Infinity }
    const vocabularies = [null, new Vocabulary('item', ids)]
    const encoder = { config: architecture, vocabularies, unknownIds: 'error' as const }
    const golden = trainingLogits({ model, table: null }, [checkRequest(request, limits)], encoder, schema)
    await writeBundle<RankerManifest>(
      folder,
      {
        ...{ type: 'ranker', model: `synthetic-${size}`, architecture, precision: 'bf16', schema },
        ...{ maxHistory: MAX_HISTORY, table: null, rates: null, golden: { request, logits: Array.from(golden) } },
      },
      { tensors: { model: model.parameters }, vocabularies: [null, ids] },
    )
  } finally {
    model.dispose()
  }
}
