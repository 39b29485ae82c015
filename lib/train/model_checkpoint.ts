import type { SequenceDataset } from '../data/dataset.js'
import { check, HstuError } from '../errors.js'
import type { Metrics } from '../eval/metrics.js'
import { type AnySequenceModel, createModel, type ModelSpec } from '../models/create.js'
import type { ModelOptions } from '../models/sequence_model.js'
import { assignTensors, type CheckpointContent, loadCheckpoint } from './checkpoint.js'
import type { TrainOptions } from './options.js'
import { fromCheckpoint } from './state.js'

/** How a saved model came to be. */
export interface ModelOrigin {
  options: TrainOptions
  epoch: number
  /** Of the evaluation that chose it. */
  metrics: Metrics | null
}

/** A saved model: what it is, which items it knows, how it was trained. */
export interface LoadedModel {
  model: AnySequenceModel
  spec: ModelSpec
  /** External ids by internal id; `itemIds[0]` is padding. */
  itemIds: string[]
  origin: ModelOrigin
  step: number
}

/** A model as checkpoint content: parameters, config, and the vocabulary in a file of its own. */
export function modelContent(
  model: AnySequenceModel,
  spec: ModelSpec,
  dataset: SequenceDataset,
  origin: ModelOrigin,
): CheckpointContent {
  return {
    kind: 'model',
    tensors: { model: model.parameters },
    json: { model: spec, origin, tensors: model.options },
    files: { 'vocabulary.json': JSON.stringify(dataset.itemIds) },
  }
}

/**
 * Reads a model that a trainer saved (`<run>/best`). It computes in the precision that it was trained in, on the CPU in float32.
 * @throws HstuError ERR_HSTU_CHECKPOINT when it is missing, damaged or no model.
 */
export function loadModel(folder: string, options: ModelOptions = {}): Promise<LoadedModel> {
  return fromCheckpoint(folder, () => restoreModel(folder, options))
}

async function restoreModel(folder: string, options: ModelOptions): Promise<LoadedModel> {
  const { kind, json, tensors, files, step } = await loadCheckpoint(folder)
  check(
    kind === 'model',
    'ERR_HSTU_CHECKPOINT',
    () => `${folder}: holds a '${kind}' checkpoint, not a model (look in best/)`,
  )
  const {
    model: spec,
    origin,
    tensors: saved,
  } = json as unknown as { model: ModelSpec; origin: ModelOrigin; tensors: ModelOptions }
  let itemIds: unknown
  try {
    itemIds = JSON.parse(files['vocabulary.json'] ?? '')
  } catch (cause) {
    throw new HstuError('ERR_HSTU_CHECKPOINT', `${folder}: vocabulary.json is missing or no JSON`, { cause })
  }
  check(Array.isArray(itemIds) && itemIds.length === spec.config.numItems + 1, 'ERR_HSTU_CHECKPOINT', () => {
    return `${folder}: vocabulary.json does not list the model's ${spec.config.numItems} items`
  })
  const { device = 'cpu' } = { ...saved, ...options }
  const elsewhere: ModelOptions = device === 'cpu' ? { precision: 'float32' } : {}
  const model = createModel(spec, 0, { ...saved, ...elsewhere, ...options })
  try {
    assignTensors(model.parameters, tensors.model!, folder)
  } catch (error) {
    model.dispose()
    throw error
  }
  return { model, spec, itemIds: itemIds as string[], origin, step }
}

/**
 * Checks that a dataset numbers its items as the model does.
 * @throws HstuError ERR_HSTU_DATA naming the first item that differs.
 */
export function checkVocabulary(loaded: LoadedModel, dataset: SequenceDataset): void {
  const { itemIds } = loaded
  const differs = dataset.itemIds.findIndex((id, i) => id !== itemIds[i])
  if (differs === -1 && dataset.itemIds.length === itemIds.length) return
  const at = differs === -1 ? dataset.itemIds.length : differs
  throw new HstuError(
    'ERR_HSTU_DATA',
    `${dataset.name}: its items are not those that the model was trained on: item ${at} is ` +
      `'${dataset.itemIds[at] ?? '(none)'}' here and '${itemIds[at] ?? '(none)'}' in the model`,
  )
}
