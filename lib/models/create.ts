import { HstuError } from '../errors.js'
import { HSTU, type HstuConfig } from './hstu.js'
import { SASRec, type SASRecConfig } from './sasrec.js'
import type { ModelOptions } from './sequence_model.js'
import { Transformer, type TransformerConfig } from './transformer.js'

/** A model in plain JSON: what presets name and checkpoints keep. */
export type ModelSpec =
  | { kind: 'hstu'; config: HstuConfig }
  | { kind: 'sasrec'; config: SASRecConfig }
  | { kind: 'transformer'; config: TransformerConfig }

/** What `createModel` returns. */
export type AnySequenceModel = HSTU | SASRec | Transformer

/**
 * Makes a model with the initial weights of `seed`.
 * @throws HstuError ERR_HSTU_INVALID_ARGUMENT for an unknown kind or a config that makes no sense.
 */
export function createModel(spec: ModelSpec, seed: number | string = 0, options: ModelOptions = {}): AnySequenceModel {
  switch (spec.kind) {
    case 'hstu':
      return new HSTU(spec.config, seed, options)
    case 'sasrec':
      return new SASRec(spec.config, seed, options)
    case 'transformer':
      return new Transformer(spec.config, seed, options)
  }
  const { kind } = spec as { kind: string }
  throw new HstuError('ERR_HSTU_INVALID_ARGUMENT', `unknown model '${kind}': one of hstu, sasrec, transformer`)
}
