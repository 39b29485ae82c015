import { createHash } from 'node:crypto'
import type { RequestReader } from '../data/ranking/reader.js'
import { HstuError } from '../errors.js'
import type { EmbeddingTableState } from '../layers/embedding_table.js'
import { assignTensors, type CheckpointContent, type LoadedCheckpoint } from './checkpoint.js'
import type { RankState, RankTrainerSetting } from './rank_events.js'
import type { RankFeed, RankFeedState } from './rank_feed.js'
import type { RankMetrics, RankMetricsState } from './rank_metrics.js'
import type { RankParts } from './rank_step.js'

/** All that a run changes, and the records that it goes through. */
export interface RankRun extends RankParts {
  metrics: RankMetrics
  feed: RankFeed
  state: RankState
  reader: RequestReader
}

/** The JSON of a checkpoint. */
interface SavedRanking {
  setting: RankTrainerSetting
  state: RankState
  metrics: RankMetricsState
  table: EmbeddingTableState | null
  feed: RankFeedState
  optimizerSteps: number
  philoxOffset: string
  records: string
}

/** All that is needed to go on exactly. */
export function rankContent(run: RankRun, setting: Omit<RankTrainerSetting, 'folder'>): CheckpointContent {
  const { model, optimizer, philox, state, reader } = run
  const [metrics, table, feed] = [run.metrics.state(), run.table?.state(), run.feed.state()]
  return {
    kind: 'ranking',
    tensors: {
      ...{ model: model.parameters, m: optimizer.m, v: optimizer.v, counted: metrics.tensors },
      ...(Object.keys(feed.tensors).length > 0 ? { feed: feed.tensors } : {}),
      ...(table ? { table: table.tensors } : {}),
    },
    json: {
      ...{ setting, state, metrics: metrics.json, table: table?.json ?? null, feed: feed.json },
      ...{ optimizerSteps: optimizer.steps, philoxOffset: String(philox.offset), records: fingerprint(reader) },
    },
  }
}

/** The setting of a checkpoint's run. @throws HstuError ERR_HSTU_CHECKPOINT where it is of another kind or of other records. */
export function savedSetting({ kind, json }: LoadedCheckpoint, reader: RequestReader, folder: string) {
  const fail = (message: string) => new HstuError('ERR_HSTU_CHECKPOINT', `${folder}: ${message}`)
  if (kind !== 'ranking') throw fail(`holds a '${kind}' checkpoint, not a ranking run's`)
  const saved = json as unknown as SavedRanking
  if (saved.records !== fingerprint(reader))
    throw fail(`the run was trained on other records than those in ${reader.folder}`)
  return saved.setting
}

/** Puts a run where the checkpoint's was. @throws HstuError ERR_HSTU_CHECKPOINT naming what does not fit. */
export function restoreRank(run: RankRun, { json, tensors }: LoadedCheckpoint, folder: string): void {
  const saved = json as unknown as SavedRanking
  assignTensors(run.model.parameters, tensors.model!, `${folder}: model`)
  assignTensors(run.optimizer.m, tensors.m!, `${folder}: first moments`)
  assignTensors(run.optimizer.v, tensors.v!, `${folder}: second moments`)
  run.table?.restore(tensors.table!, saved.table!)
  run.metrics.restore(saved.metrics, tensors.counted!)
  run.feed.restore(saved.feed, tensors.feed)
  Object.assign(run.state, saved.state)
  run.optimizer.steps = saved.optimizerSteps
  run.philox.offset = BigInt(saved.philoxOffset)
}

/** Hash of the manifest, which knows sizes and counts of all shards. */
function fingerprint({ manifest }: RequestReader): string {
  return createHash('sha256').update(JSON.stringify(manifest)).digest('hex')
}
