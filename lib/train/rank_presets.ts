import { HstuError } from '../errors.js'
import type { RankerShape } from './rank_events.js'
import type { RankOptions } from './rank_options.js'

/** A ranker and how it is trained on a public stream. */
export interface RankPreset {
  /** Name of the records: that of a log in `rankingPreset`, or ranking/synthetic. */
  records: string
  model: RankerShape
  options: Partial<RankOptions>
  /** Tasks that are learnt beside those of the records for what they say about them; see `parseTask`. */
  auxiliary?: readonly string[]
}

const small: RankerShape = {
  ...{ dim: 32, layers: 2, heads: 2, qkDim: 16, vDim: 16, scalingSeqLen: 512, embeddings: 'hash' },
  ...{ inputDropout: 0.2, linearDropout: 0.3 },
}

const recipe: Partial<RankOptions> = {
  ...{
    batchSize: 64,
    maxHistory: 100,
    lr: 2e-3,
    tableLr: 0.05,
    schedule: 'cosine',
    finalShare: 0.1,
    tableFinalShare: 0.1,
  },
}

const movies: RankPreset = {
  ...{ records: 'ranking/ml-100k', model: small },
  // Most users of the last fifth are new. How much a film was liked says more than whether it was.
  options: { ...recipe, userIds: false },
  auxiliary: ['fair = rating >= 2', 'decent = rating >= 3', 'great = rating >= 5'],
}

const articles: RankPreset = {
  records: 'ranking/deskdrop',
  model: { ...small, layers: 1, concat: true, positionBias: false, inputDropout: 0.1 },
  // Most requests have one candidate; articles are new and rates drift.
  options: { ...recipe, batchSize: 16, idDropout: 0.5, baseRateWindow: 3000, idRates: true, gaucBy: 'user' },
}

/** Of several passes: a user's sequence is learnt from for all its new labels at once. The last steps hardly change what was learnt. */
const sequences: Partial<RankOptions> = {
  ...{ passes: 4, supervise: 'new', learnEvery: 16, batchSize: 256, maxHistory: 200, finalShare: 0.01 },
}

const presets: Record<string, RankPreset> = {
  'ranking/ml-100k': movies,
  'ranking/ml-100k-passes': { ...movies, options: { ...movies.options, ...sequences } },
  'ranking/deskdrop': articles,
  'ranking/deskdrop-passes': { ...articles, options: { ...articles.options, passes: 2, finalShare: 0.01 } },
  'ranking/synthetic': { records: 'ranking/synthetic', model: small, options: { ...recipe, maxHistory: 128 } },
}

/** Names of {@link rankPreset}. */
export const rankPresetNames: readonly string[] = Object.keys(presets)

/**
 * Model and training options of a ranking preset, e.g. 'ranking/ml-100k'.
 * @throws HstuError ERR_HSTU_INVALID_ARGUMENT that lists the names.
 */
export function rankPreset(name: string): RankPreset {
  if (!Object.hasOwn(presets, name))
    throw new HstuError('ERR_HSTU_INVALID_ARGUMENT', `unknown preset '${name}'. Presets: ${rankPresetNames.join(', ')}`)
  return presets[name]!
}
