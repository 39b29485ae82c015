import { HstuError } from '../errors.js'
import type { RankOptions } from './rank_options.js'
import type { RankerShape } from './rank_trainer.js'

/** A ranker and how it is trained on a public stream. */
export interface RankPreset {
  model: RankerShape
  options: Partial<RankOptions>
}

const small: RankerShape = {
  ...{ dim: 32, layers: 2, heads: 2, qkDim: 16, vDim: 16, scalingSeqLen: 256 },
  ...{ inputDropout: 0.3, linearDropout: 0.3 },
}

const recipe: Partial<RankOptions> = { batchSize: 64, maxHistory: 100, lr: 2e-3, schedule: 'cosine' }

const presets: Record<string, RankPreset> = {
  'ranking/ml-100k': { model: small, options: recipe },
  // Most requests have one candidate.
  'ranking/deskdrop': { model: small, options: { ...recipe, gaucBy: 'user' } },
  'ranking/synthetic': { model: small, options: { ...recipe, maxHistory: 128 } },
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
