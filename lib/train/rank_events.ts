import type { GenerativeRankerConfig } from '../models/generative_ranker.js'
import type { TensorOptions } from '../tensor.js'
import type { RankMetrics, TaskMetrics } from './rank_metrics.js'
import type { RankOptions } from './rank_options.js'

/** A ranker but for what the records say: vocabularies, actions and tasks. */
export type RankerShape = Omit<GenerativeRankerConfig, 'vocabulary' | 'actions' | 'tasks'>

export interface RankTrainerSetting {
  model: RankerShape
  /** See `parseTask`; default those of the records. */
  tasks?: readonly string[]
  /** Of the tasks' losses, by name; default 1. */
  taskWeights?: Record<string, number>
  options?: Partial<RankOptions>
  /** Where `checkpoint/` goes. None: nothing is written. */
  folder?: string
  tensors?: TensorOptions
}

/** Where a run stands; plain JSON, kept in checkpoints. */
export interface RankState {
  /** Passes over the training part that are done; the counted part comes after the last one. */
  pass: number
  /** Number of the next request. */
  cursor: number
  step: number
  /** Requests and impressions trained on, over all passes. */
  requests: number
  impressions: number
  /** Time spent so far, over all sessions. */
  seconds: number
  /** The windowed NE of each binary task now and then; null where it is not defined. */
  curve: { request: number; time: number; ne: Record<string, number | null> }[]
}

/** What a run tells as it goes. On CUDA a 'step' comes while up to two later steps are under way. */
export type RankEvent =
  | { type: 'start'; step: number; totalSteps: number; parameters: number; requests: number }
  | {
      type: 'step'
      step: number
      totalSteps: number
      pass: number
      /** Number of the next request. */
      request: number
      /** null where no request of the step was learnt from. */
      loss: number | null
      lr: number
      impressionsPerSecond: number
      etaSeconds: number
    }
  | { type: 'window'; request: number; metrics: ReturnType<RankMetrics['windowed']> }
  | { type: 'checkpoint'; step: number; folder: string }
  | { type: 'interrupted'; step: number; folder: string | null }
  | { type: 'done'; step: number; seconds: number; counted: TaskMetrics; lifetime: ReturnType<RankMetrics['lifetime']> }

/** A session of a run: since when, from which step on, after how many seconds of earlier sessions, and with how many impressions. */
export interface RankSession {
  start: number
  step: number
  seconds: number
  impressions: number
}
