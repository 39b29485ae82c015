import type { Supervision } from '../data/ranking/tasks.js'
import { type LengthSelection, lengthSelections } from '../data/stochastic_length.js'
import { HstuError } from '../errors.js'
import { type Precision, precisions } from '../layers/precision.js'
import type { AdamWOptions } from '../optim/adamw.js'
import type { ScheduleOptions } from '../optim/schedule.js'

/** How a ranker is trained on a stream; plain JSON, kept in checkpoints. */
export interface RankOptions extends Required<AdamWOptions>, Required<ScheduleOptions> {
  /** What the model computes in: 'float32' (default) or 'bf16' (CUDA). */
  precision: Precision
  /** Requests a step. */
  batchSize: number
  /** Of the initial weights, dropouts and new rows. */
  seed: number
  /** Passes over the training part; 1 (default) is streaming. The counted part is gone through once, after them. */
  passes: number
  /** Share of the requests, in order of time, that is the training part; the rest is counted. Default 0.8. */
  trainShare: number
  /** Share of the requests that the run ends with: 0.8 keeps the last fifth out, as a choice of options must. Default 1. */
  until: number
  /** Which rows have a loss. Default 'candidates'; 'history' is generative, each label once as well; 'new' goes with `userRate`. */
  supervise: Supervision
  /** Rows of a history: the latest ones. */
  maxHistory: number
  /**
   * alpha of Stochastic Length in training, in (1, 2], N being the tokens of `maxHistory` rows; 0 (default): histories stay as they are.
   * Predictions always see all.
   */
  stochasticLength: number
  /** What stays of a history that is cut; default 'weighted'. */
  lengthSelection: LengthSelection
  /**
   * c: each impression sends its user's sequence of n rows into training with rate c / n (Zhai et al. 2024, section 2.3: 1 / n), all of a
   * request at once; with `supervise: 'new'`, so that the labels since the user's last one go with it. 0 (default): every request.
   */
  userRate: number
  /**
   * A user's sequence is learnt from whenever so many of its labels are new, once for all of them; with `supervise: 'new'`. The way to go
   * over the records several times: each label once a pass, but for fewer than this at the end of a user's. 0 (default): see `userRate`.
   */
  learnEvery: number
  /** Whether users are told apart by an id of their own; where most are new it is of no use. Default true. */
  userIds: boolean
  /** Chance that an item is unknown in training, so that the row of unknown items is learnt. Default 0. */
  idDropout: number
  /**
   * Logits are learnt on top of that of each binary task's base rate, over about so many impressions before the step: a rate that drifts is
   * followed at once. 0 (default): no such offset.
   */
  baseRateWindow: number
  /**
   * Besides, on top of the smoothed rates of the impression's user (of its last hundred or so impressions) and item so far in the pass, as
   * logits less that of the rate of all: the additive logit. Candidates alone may have a loss then, for the rates know the labels of the
   * history. Default false.
   */
  idRates: boolean
  /** Impressions of the windowed metrics. */
  window: number
  /** Steps between 'window' events; 0: none. */
  windowEvery: number
  /** What GAUC of the counted part groups by; users where most requests have one candidate. */
  gaucBy: 'request' | 'user'
  /** Steps between checkpoints; 0: none but at the start, the end and an interruption. */
  checkpointEvery: number
  /** Learning rate of 'hash' embeddings (row-wise Adagrad); it follows the schedule. */
  tableLr: number
  /** Share of `tableLr` that the cosine ends at, for new items go on coming. Default 0. */
  tableFinalShare: number
  /** Their rows at most (`maxRows` of the table), and what happens to new ids then: an error, room for them, or row 0; counted. */
  tableRows: number
  whenFull: 'error' | 'evict' | 'skip'
}

const defaults: RankOptions = {
  ...{ precision: 'float32', batchSize: 32, seed: 0, passes: 1, trainShare: 0.8, until: 1 },
  ...{ supervise: 'candidates', userIds: true, idDropout: 0, baseRateWindow: 0, idRates: false },
  ...{ stochasticLength: 0, lengthSelection: 'weighted', userRate: 0, learnEvery: 0 },
  ...{ maxHistory: 256, window: 10_000, windowEvery: 100, gaucBy: 'request', checkpointEvery: 500 },
  ...{ tableLr: 0.02, tableFinalShare: 0, tableRows: 2 ** 30, whenFull: 'error' },
  ...{ lr: 1e-3, betas: [0.9, 0.98], eps: 1e-8, weightDecay: 0, clipNorm: 0, warmupSteps: 0 },
  ...{ schedule: 'constant', finalShare: 0 },
}

/**
 * Fills in the defaults and checks every value.
 * @throws HstuError ERR_HSTU_INVALID_ARGUMENT naming the option, its value and what is allowed.
 */
export function rankOptions(options: Partial<RankOptions>): RankOptions {
  const all = { ...defaults, ...options }
  const check = (name: keyof RankOptions, holds: boolean, wanted: string) => {
    if (holds) return
    throw new HstuError('ERR_HSTU_INVALID_ARGUMENT', `${name} must be ${wanted}, got ${JSON.stringify(all[name])}`)
  }
  for (const name of Object.keys(options))
    if (!Object.hasOwn(defaults, name)) {
      const names = Object.keys(defaults).join(', ')
      throw new HstuError('ERR_HSTU_INVALID_ARGUMENT', `unknown training option '${name}'. Options: ${names}`)
    }
  for (const name of ['batchSize', 'passes', 'window'] as const)
    check(name, Number.isSafeInteger(all[name]) && all[name] > 0, 'a positive integer')
  for (const name of ['seed', 'maxHistory', 'windowEvery', 'checkpointEvery', 'warmupSteps', 'learnEvery'] as const)
    check(name, Number.isSafeInteger(all[name]) && all[name] >= 0, 'a non-negative integer')
  for (const name of ['lr', 'eps', 'tableLr'] as const)
    check(name, all[name] > 0 && all[name] < Infinity, 'a positive number')
  for (const name of ['weightDecay', 'clipNorm', 'userRate', 'baseRateWindow'] as const)
    check(name, all[name] >= 0 && all[name] < Infinity, 'a non-negative number')
  check('betas', all.betas.length === 2 && all.betas.every(beta => beta >= 0 && beta < 1), 'two numbers in [0, 1)')
  const alpha = all.stochasticLength
  check('stochasticLength', alpha === 0 || (alpha > 1 && alpha <= 2), '0 or in (1, 2]')
  for (const name of ['trainShare', 'until', 'finalShare', 'tableFinalShare'] as const)
    check(name, all[name] >= 0 && all[name] <= 1, 'in 0 .. 1')
  check('until', all.until >= all.trainShare, `at least trainShare, ${all.trainShare}`)
  check('idDropout', all.idDropout >= 0 && all.idDropout < 1, 'in [0, 1)')
  check(
    'idRates',
    !all.idRates || (all.supervise === 'candidates' && all.baseRateWindow > 0),
    "false but with supervise 'candidates' and a baseRateWindow",
  )
  check('userIds', typeof all.userIds === 'boolean', 'true or false')
  check('tableRows', Number.isInteger(all.tableRows) && all.tableRows > 1 && all.tableRows <= 2 ** 30, 'in 2 .. 2^30')
  const oneOf = (name: keyof RankOptions, values: readonly string[]) =>
    check(name, values.includes(all[name] as string), `one of ${values.join(', ')}`)
  oneOf('precision', precisions)
  oneOf('supervise', ['candidates', 'history', 'new', 'all'])
  check(
    'supervise',
    all.supervise === 'new' || all.userRate + all.learnEvery === 0,
    "'new' where userRate or learnEvery is set",
  )
  check('learnEvery', all.learnEvery === 0 || all.userRate === 0, '0 where userRate is set')
  oneOf('lengthSelection', lengthSelections)
  oneOf('gaucBy', ['request', 'user'])
  oneOf('schedule', ['constant', 'cosine'])
  oneOf('whenFull', ['error', 'evict', 'skip'])
  return all
}
