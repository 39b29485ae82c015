import { HstuError } from '../errors.js'
import type { ModelSpec } from '../models/create.js'
import type { HstuConfig } from '../models/hstu.js'
import type { SASRecConfig } from '../models/sasrec.js'
import type { SequenceModelConfig } from '../models/sequence_model.js'
import { type TrainOptions, trainOptions } from '../train/options.js'
import type { Preset } from '../train/presets.js'
import { type Args, suggestion, UsageError } from './args.js'

const common = [
  ...(['dim', 'layers', 'heads', 'maxLength', 'paddedLength', 'inputDropout', 'linearDropout'] as const),
] satisfies (keyof SequenceModelConfig)[]
const hstuOnly = [
  ...(['qkDim', 'vDim', 'positionBias', 'timeBias', 'timeBuckets', 'activation', 'alpha'] as const),
  ...(['affine', 'siluAll', 'concat'] as const),
] satisfies (keyof HstuConfig)[]
const sasrecOnly = ['ffnDim'] as const satisfies (keyof SASRecConfig)[]

const modelKeys: Record<ModelSpec['kind'], readonly string[]> = {
  hstu: [...common, ...hstuOnly],
  sasrec: [...common, ...sasrecOnly],
  transformer: common,
}

/** `3`, `true`, `[0.9,0.98]` as what they are, anything else as text. */
export function parseValue(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    return text
  }
}

/** A preset's model with the changes of `--model-set`. @throws HstuError ERR_HSTU_INVALID_ARGUMENT for an unknown key. */
export function modelSpec(args: Args, preset: Preset, numItems: number): ModelSpec {
  const spec = preset.model(numItems)
  const known = modelKeys[spec.kind]
  const changes: Record<string, unknown> = {}
  for (const [key, text] of args.pairs('model-set')) {
    if (!known.includes(key))
      throw new HstuError(
        'ERR_HSTU_INVALID_ARGUMENT',
        `unknown option '${key}' of model '${spec.kind}'.${suggestion(key, known)} Options: ${known.join(', ')}`,
      )
    const value = parseValue(text)
    const wanted =
      key === 'activation'
        ? 'string'
        : ['positionBias', 'timeBias', 'affine', 'siluAll', 'concat'].includes(key)
          ? 'boolean'
          : 'number'
    if (typeof value !== wanted)
      throw new UsageError(`--model-set ${key} expects a ${wanted}, got '${text}'`, args.command)
    changes[key] = value
  }
  return { ...spec, config: { ...spec.config, ...changes } } as ModelSpec
}

/** Training options that the command line names, and no others. */
export function explicitOptions(args: Args): Partial<TrainOptions> {
  const options: Record<string, unknown> = {
    seed: args.integer('seed'),
    epochs: args.integer('epochs', 1),
    batchSize: args.integer('batch-size', 1),
    lr: args.number('lr'),
    patience: args.integer('patience'),
    evaluateEvery: args.integer('evaluate-every'),
    precision: args.text('precision'),
    part: args.text('split'),
    filterSeen: args.text('filter-seen'),
  }
  for (const key of Object.keys(options)) if (options[key] === undefined) delete options[key]
  for (const [key, text] of args.pairs('set')) options[key] = parseValue(text)
  const all = trainOptions(options as Partial<TrainOptions>) // names what is wrong
  if (all.part === 'all')
    throw new HstuError('ERR_HSTU_INVALID_ARGUMENT', "part 'all' leaves nothing to test on: use 'valid' or 'paper'")
  return options as Partial<TrainOptions>
}

const changeable = ['epochs', 'patience', 'checkpointEvery', 'cudaGraphs'] as const

/**
 * What a resumed run may change, out of what the command line names.
 * @throws HstuError ERR_HSTU_INVALID_ARGUMENT for an option that the run was started with differently and cannot change.
 */
export function resumeOptions(
  explicit: Partial<TrainOptions>,
  saved: TrainOptions,
): Partial<Pick<TrainOptions, (typeof changeable)[number]>> {
  const allowed: Record<string, unknown> = {}
  for (const [key, value] of Object.entries(explicit)) {
    if ((changeable as readonly string[]).includes(key)) allowed[key] = value
    else if (JSON.stringify(value) !== JSON.stringify(saved[key as keyof TrainOptions]))
      throw new HstuError(
        'ERR_HSTU_INVALID_ARGUMENT',
        `the run was started with ${key}=${JSON.stringify(saved[key as keyof TrainOptions])} and cannot go on with ` +
          `${JSON.stringify(value)}; only ${changeable.join(', ')} may change`,
      )
  }
  return allowed
}
