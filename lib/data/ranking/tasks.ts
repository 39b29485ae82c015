import { check, HstuError } from '../../errors.js'
import { quoted } from '../files.js'
import type { RequestBatch, RequestSchema, TaskTargets } from './schema.js'

/** What one head of a ranker predicts. */
export interface RankingTask {
  name: string
  /** Binary tasks have labels 0 and 1, regression tasks the value itself. */
  kind: 'binary' | 'regression'
  /** Binary by actions: mask of the actions any of which makes the label 1; 0 for a task on a value. */
  actions: number
  /** Of a task on a value: its name. */
  value: string | null
  /** Label 1 where `value >= atLeast` (binary tasks on a value). */
  atLeast: number | null
  /** Weight 0 where the user took one of the actions on the item before: it cannot be taken again. */
  once: boolean
}

const UNITS: Record<string, number> = { '': 1, s: 1, min: 60, h: 3600 }

/**
 * A task from its text form:
 *
 * - `like = LIKE or BOOKMARK`: binary, 1 where any of the actions was taken;
 * - `like = LIKE once`: besides, weight 0 where the user had taken it on this item before;
 * - `long = watch >= 30 s`: binary, by a value; `s`, `min`, `h` or no unit;
 * - `watch_time = watch`: regression on a value.
 *
 * @throws HstuError ERR_HSTU_DATA naming what is known.
 */
export function parseTask(text: string, schema: RequestSchema, where = 'task'): RankingTask {
  const fail = (message: string): never => {
    throw new HstuError('ERR_HSTU_DATA', `${where}: ${message}`)
  }
  const [, name = '', body = ''] = /^\s*([A-Za-z_]\w*)\s*=(?!=)\s*(.+?)\s*$/.exec(text) ?? []
  if (name === '') fail(`expected "name = ACTION or ACTION" or "name = value >= number", found ${quoted(text)}`)
  const task = { name, kind: 'binary', actions: 0, value: null, atLeast: null, once: false } as RankingTask
  const bound = /^(.+?)\s*>=\s*([-+.\deE]+)\s*([a-z]*)$/.exec(body)
  if (bound) {
    const [, value, number, unit] = bound as unknown as [string, string, string, string]
    if (!schema.values.includes(value)) fail(`no value ${quoted(value)}; values are ${list(schema.values)}`)
    if (!Object.hasOwn(UNITS, unit)) fail(`unit ${quoted(unit)} is not one of s, min, h`)
    if (!Number.isFinite(Number(number))) fail(`${quoted(number)} is no number`)
    return { ...task, value, atLeast: Number(number) * UNITS[unit]! }
  }
  if (schema.values.includes(body)) return { ...task, kind: 'regression', value: body }
  const once = /\s+once$/.test(body)
  for (const action of body.replace(/\s+once$/, '').split(/\s+or\s+/)) {
    const bit = schema.actions.indexOf(action)
    if (bit < 0)
      fail(`no action ${quoted(action)}; actions are ${list(schema.actions)}, values are ${list(schema.values)}`)
    task.actions |= 1 << bit
  }
  return { ...task, once }
}

const list = (names: readonly string[]) => (names.length === 0 ? 'none' : names.map(name => quoted(name)).join(', '))

/** Parses all of them. @throws HstuError ERR_HSTU_DATA, also for a name used twice. */
export function parseTasks(texts: readonly string[], schema: RequestSchema): RankingTask[] {
  const tasks = texts.map((text, k) => parseTask(text, schema, `tasks[${k}]`))
  const double = tasks.find((task, k) => tasks.findIndex(other => other.name === task.name) !== k)
  check(!double, 'ERR_HSTU_DATA', () => `two tasks are named ${quoted(double!.name)}`)
  return tasks
}

/**
 * Which rows are supervised. Only what was shown has labels: candidates, and rows of a history that were a candidate.
 *
 * - `'candidates'` (default): candidates alone;
 * - `'history'`: rows of the history from `supervisedFrom` on, no candidates (they are the next record's history);
 * - `'new'`: candidates, and rows of the history of requests after `after[b]`, the user's last record trained on: for
 *   training on some of a user's records (rate 1/n), each label once;
 * - `'all'`: candidates and all of the history.
 *
 * The first three give each label at most once over a pass through the records.
 */
export type Supervision = 'candidates' | 'history' | 'new' | 'all'

export interface TaskTargetOptions {
  supervise?: Supervision
  /** [B] number of the user's last request trained on, -1 for none; with `'new'` */
  after?: Int32Array
}

/** Labels and weights of a batch. Rows whose actions were not all known at the request's time have weight 0. */
export function taskTargets(
  batch: RequestBatch,
  tasks: readonly RankingTask[],
  { supervise = 'candidates', after }: TaskTargetOptions = {},
): TaskTargets {
  check(
    (supervise === 'new') === (after !== undefined) && (!after || after.length === batch.requests.length),
    'ERR_HSTU_INVALID_ARGUMENT',
    () => `after goes with supervise 'new' and has an entry for each of the ${batch.requests.length} requests`,
  )
  const { history, candidates, supervisedFrom } = batch
  const [T, M, K] = [history.items.length, candidates.items.length, tasks.length]
  const rows = supervise === 'candidates' ? [] : supervisedRows()
  const targets: TaskTargets = {
    labels: new Float32Array(M * K),
    weights: new Float32Array(M * K),
    historyLabels: new Float32Array(T * K),
    historyWeights: new Float32Array(T * K),
  }
  const known = { labels: targets.historyLabels, weights: targets.historyWeights }
  tasks.forEach((task, k) => {
    const valuesOf = (of: { values: Record<string, Float32Array> }) => {
      const values = task.value === null ? null : of.values[task.value]
      check(values !== undefined, 'ERR_HSTU_DATA', () => `task ${task.name}: the records have no value ${task.value}`)
      return values
    }
    const [shown, past] = [valuesOf(candidates), valuesOf(history)]
    if (supervise !== 'history')
      for (let m = 0; m < M; m++)
        assign(task, targets, m * K + k, candidates.actions[m]!, candidates.taken[m]!, shown?.[m])
    if (supervise === 'candidates') return
    const { actions, taken } = history
    for (let t = 0; t < T; t++) if (rows[t]) assign(task, known, t * K + k, actions[t]!, taken[t]!, past?.[t])
  })
  return targets

  function supervisedRows(): Uint8Array {
    const supervised = new Uint8Array(T)
    for (let b = 0; b < supervisedFrom.length; b++) {
      const first = Number(history.offsets[b]!)
      const end = Number(history.offsets[b + 1]!)
      const last = after ? after[b]! : -1
      const { requests, pending } = history
      for (let t = supervise === 'history' ? first + supervisedFrom[b]! : first; t < end; t++)
        supervised[t] = Number(requests[t]! > last && pending[t] === 0)
    }
    return supervised
  }
}

function assign(
  task: RankingTask,
  to: { labels: Float32Array; weights: Float32Array },
  at: number,
  actions: number,
  taken: number,
  value: number | undefined,
): void {
  if (value !== undefined) {
    if (Number.isNaN(value)) return
    to.labels[at] = task.atLeast === null ? value : Number(value >= task.atLeast)
    to.weights[at] = 1
    return
  }
  to.labels[at] = Number((actions & task.actions) !== 0)
  to.weights[at] = Number(!(task.once && (taken & task.actions) !== 0))
}
