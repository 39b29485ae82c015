/**
 * An event of the log, one row. Ids are text until they are numbered. Rows of one user, item and request id become one
 * entry of the user's series, its actions OR-ed.
 */
export interface RankingEvent {
  user: string
  item: string
  /** Whole seconds. */
  time: bigint
  /** The request that showed the item; where the log has none, user and time make one. */
  requestId: string
  /** Bit k is action k of {@link RequestSchema.actions}. */
  actions: number
  /** Whether the row shows the item (makes it a candidate); others are engagement alone, such as a late label. */
  impression: boolean
  /** Numeric labels, one a name of {@link RequestSchema.values}; NaN where absent. */
  values: readonly number[]
  /** Of the request, one a name of {@link RequestSchema.contextual}; null where absent. */
  contextual: readonly (string | null)[]
  /** Slow-changing features, one a name of {@link RequestSchema.series}; null where absent. */
  series: readonly (string | null)[]
}

/** What the columns of request records mean; stands in the manifest of a prepared folder. */
export interface RequestSchema {
  /** Names of the action bits, at most 31; bit k of every action mask is `actions[k]`. */
  actions: readonly string[]
  /** Numeric labels, such as watch seconds or a rating. */
  values: readonly string[]
  /** Contextual features of a request: the leading tokens of its sequence. */
  contextual: readonly string[]
  /** Auxiliary series, merged into the history; series s (from 1) is `series[s - 1]`, 0 is the main series of items. */
  series: readonly string[]
}

/**
 * A request record, one row of the Parquet shards `requests-*.parquet`: what was known when the request was made, its
 * candidates, and what became of them. Lists named `history_*` share one length, so do those named `candidate_*`.
 * Any engine may write them; rows are in order of `request`, which is the order of time.
 *
 * Numbers of users, items and feature values start at 1, by first appearance in time; 0 is unknown. Their external ids
 * are in `vocabulary-*.parquet` (`number BIGINT, id VARCHAR`), as text.
 */
export const REQUEST_COLUMNS = {
  /** 0, 1, ... over all shards. */
  request: 'INTEGER',
  request_id: 'VARCHAR',
  user: 'BIGINT',
  /** Whole seconds. */
  time: 'BIGINT',
  /** One a contextual feature; 0 where absent. */
  contextual: 'BIGINT[]',
  /** Earlier entries of the user's series that the record leaves out (`maxHistory`). */
  history_start: 'INTEGER',
  /** Number of an item, or of a value of an auxiliary series. Entries are in order of time, before the request's. */
  history_item: 'BIGINT[]',
  /** 0 main, s: auxiliary series s. */
  history_series: 'UTINYINT[]',
  history_time: 'BIGINT[]',
  /** Actions known at the request's time. */
  history_action: 'INTEGER[]',
  /** Actions taken on the entry's item before the entry: no new label. */
  history_taken: 'INTEGER[]',
  /** Actions that came at the request's time or later: the model may not see them. */
  history_pending: 'INTEGER[]',
  /** `request` of the record that has the entry as a candidate; -1 if none has. */
  history_request: 'INTEGER[]',
  /** Entries from this index on (into the lists) are in no earlier record's history. */
  supervised_from: 'INTEGER',
  candidate_item: 'BIGINT[]',
  /** Labels: actions on the candidate, whenever they came. */
  candidate_action: 'INTEGER[]',
  candidate_taken: 'INTEGER[]',
} as const

/** Besides {@link REQUEST_COLUMNS}, a `FLOAT[]` a value name: NaN where absent. */
export const historyValueColumn = (name: string) => `history_value_${name}`
/** @see historyValueColumn */
export const candidateValueColumn = (name: string) => `candidate_value_${name}`

/** Entries of B histories, T in all: request b owns rows `offsets[b] .. offsets[b + 1]`, in order of time. */
export interface HistoryRows {
  /** [B + 1] */
  offsets: BigInt64Array
  /** [T] item numbers; in auxiliary rows, numbers of the series' values */
  items: BigInt64Array
  /** [T] 0 main series, s: auxiliary series s */
  series: Uint8Array
  /** [T] seconds */
  times: BigInt64Array
  /** [T] action bits known at the request's time; 0 in auxiliary rows */
  actions: Int32Array
  /** [T] action bits taken on the same item before this row */
  taken: Int32Array
  /** [T] action bits that came at the request's time or later */
  pending: Int32Array
  /** [T] number of the request whose candidate the row was; -1 if of none */
  requests: Int32Array
  /** One array a value name, [T]; NaN where absent or not known at the request's time */
  values: Record<string, Float32Array>
}

/** Candidates of B requests, M in all: request b owns rows `offsets[b] .. offsets[b + 1]`. */
export interface CandidateRows {
  /** [B + 1] */
  offsets: BigInt64Array
  /** [M] item numbers */
  items: BigInt64Array
  /** [M] index b of the request in the batch */
  requestIndex: BigInt64Array
  /** [M] labels: action bits. Not an input of the model. */
  actions: Int32Array
  /** [M] action bits that the user had taken on the item before */
  taken: Int32Array
  /** One array a value name, [M]; NaN where absent */
  values: Record<string, Float32Array>
}

/**
 * A request-only batch on the host (ROO, arXiv 2508.05640): B requests with contextual features and history once each,
 * and M candidates in all. Arrays are packed and ready to be copied into tensors; nothing is padded.
 */
export interface RequestBatch {
  schema: RequestSchema
  /** [B] number of the request in the order of time */
  requests: Int32Array
  /** [B] as in the log */
  requestIds: string[]
  /** [B] user numbers */
  users: BigInt64Array
  /** [B] seconds */
  times: BigInt64Array
  /** [B, C] row-major numbers of feature values; 0 where absent */
  contextual: BigInt64Array
  history: HistoryRows
  /** [B] entries of the user's series that come before the first one kept */
  historyStart: Int32Array
  /** [B] index within the request's own rows from which on they are in no earlier request's history */
  supervisedFrom: Int32Array
  candidates: CandidateRows
}

/** Targets of a batch for K tasks, row-major. */
export interface TaskTargets {
  /** [M, K] of candidates: 0 or 1, or the value of a regression task */
  labels: Float32Array
  /** [M, K] 1, or 0 where there is no label or none to learn from */
  weights: Float32Array
  /** [T, K] of history rows */
  historyLabels: Float32Array
  /** [T, K] */
  historyWeights: Float32Array
}

/** Number of requests. */
export function batchSize(batch: RequestBatch): number {
  return batch.requests.length
}
