import { HstuError } from '../errors.js'
import type { ModelSpec } from '../models/create.js'
import type { TrainOptions } from './options.js'

/** A named setting of the paper's public recipe: everything but the data. */
export interface Preset {
  model: (numItems: number) => ModelSpec
  train: Partial<TrainOptions>
}

interface Shape {
  dim: number
  maxLength: number
  paddedLength: number
  dropout: number
}

const common = ({ dim, maxLength, paddedLength, dropout }: Shape) => ({
  ...{ dim, maxLength, paddedLength, inputDropout: dropout, linearDropout: dropout },
})

function family(
  shape: Shape,
  train: Partial<TrainOptions>,
  layers: { small: number; large: number },
  heads: { small: [number, number]; large: [number, number] },
): Record<'sasrec' | 'hstu' | 'hstu-large' | 'transformer', Preset> {
  const hstu = (count: number, [H, D]: [number, number]): Preset => ({
    train,
    model: numItems => ({
      kind: 'hstu',
      config: { ...common(shape), numItems, layers: count, heads: H, qkDim: D, vDim: D },
    }),
  })
  const softmax = { ...common(shape), layers: layers.small, heads: heads.small[0] }
  return {
    sasrec: { train, model: numItems => ({ kind: 'sasrec', config: { ...softmax, numItems, ffnDim: shape.dim } }) },
    hstu: hstu(layers.small, heads.small),
    'hstu-large': hstu(layers.large, heads.large),
    transformer: { train, model: numItems => ({ kind: 'transformer', config: { ...softmax, numItems } }) },
  }
}

const movieLens = { dim: 50, maxLength: 200, paddedLength: 211, dropout: 0.2 }
const small = family.bind(null, movieLens)
const smallHeads: { small: [number, number]; large: [number, number] } = { small: [1, 50], large: [2, 25] }
const amazon = { dim: 64, maxLength: 50, paddedLength: 61, dropout: 0.5 }
const amazonHeads: { small: [number, number]; large: [number, number] } = { small: [4, 16], large: [8, 8] }
const amazonTrain = { numNegatives: 512, batchSize: 128 }

const families = {
  'ml-100k': small({ epochs: 300, evaluateEvery: 5, patience: 12 }, { small: 2, large: 8 }, smallHeads),
  'ml-1m': small({ epochs: 101 }, { small: 2, large: 8 }, smallHeads),
  'ml-20m': family(
    { dim: 256, maxLength: 200, paddedLength: 211, dropout: 0.2 },
    { epochs: 101 },
    { small: 4, large: 16 },
    { small: [4, 64], large: [8, 32] },
  ),
  amazon: family(amazon, { ...amazonTrain, epochs: 100, patience: 10 }, { small: 4, large: 16 }, amazonHeads),
  'amazon-books': family(amazon, { ...amazonTrain, epochs: 201 }, { small: 4, large: 16 }, amazonHeads),
}

/** Names such as `ml-100k/hstu`. */
export const presetNames: readonly string[] = Object.entries(families).flatMap(([name, members]) => {
  return Object.keys(members).map(member => `${name}/${member}`)
})

/**
 * The preset of this name.
 * @throws HstuError ERR_HSTU_INVALID_ARGUMENT that lists the names.
 */
export function preset(name: string): Preset {
  const [first = '', second = ''] = name.split('/')
  const members = Object.hasOwn(families, first)
    ? (families as Record<string, Record<string, Preset>>)[first]
    : undefined
  const found = members && Object.hasOwn(members, second) ? members[second] : undefined
  if (!found) {
    throw new HstuError('ERR_HSTU_INVALID_ARGUMENT', `unknown preset '${name}'. Presets: ${presetNames.join(', ')}`)
  }
  return found
}
