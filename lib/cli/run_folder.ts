import { existsSync } from 'node:fs'
import { join } from 'node:path'
import type { SequenceDataset } from '../data/dataset.js'
import { HstuError } from '../errors.js'
import type { TensorOptions } from '../tensor.js'
import { checkVocabulary, type LoadedModel, loadModel } from '../train/model_checkpoint.js'

/**
 * The best model of a run, by the run's folder or that of the model itself.
 * @throws HstuError ERR_HSTU_CHECKPOINT
 */
export async function openModel(folder: string, tensors: TensorOptions): Promise<LoadedModel> {
  if (!existsSync(folder)) throw new HstuError('ERR_HSTU_CHECKPOINT', `${folder}: no such folder`)
  const best = join(folder, 'best')
  if (!existsSync(best) && existsSync(join(folder, 'checkpoint')))
    throw new HstuError(
      'ERR_HSTU_CHECKPOINT',
      `${folder}: the run was not evaluated yet and holds no best model; go on with hstu train --resume --out ${folder}`,
    )
  return loadModel(existsSync(best) ? best : folder, tensors)
}

/** {@link checkVocabulary}, freeing the model when it fails. */
export function matchData(loaded: LoadedModel, dataset: SequenceDataset): void {
  try {
    checkVocabulary(loaded, dataset)
  } catch (error) {
    loaded.model.dispose()
    throw error
  }
}
