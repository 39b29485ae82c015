import type { Metrics } from '../eval/metrics.js'
import type { TrainState } from './state.js'

/** A step whose loss is known. */
export interface StepResult {
  loss: number
  /** Tokens that went through the model. */
  tokens: number
  lr: number
}

/** What a run tells as it goes. On CUDA a 'step' comes while up to two later steps are under way. */
export type TrainEvent =
  | { type: 'start'; step: number; totalSteps: number; stepsPerEpoch: number; parameters: number; users: number }
  | ({ type: 'step'; epoch: number; step: number; totalSteps: number } & StepResult & {
        tokensPerSecond: number
        etaSeconds: number
      })
  | { type: 'evaluation'; epoch: number; step: number; loss: number; metrics: Metrics; best: boolean }
  | { type: 'checkpoint'; step: number; folder: string }
  | { type: 'interrupted'; step: number; folder: string | null }
  | { type: 'done'; step: number; epoch: number; seconds: number; best: TrainState['best']; stoppedEarly: boolean }

/** A session of a run: since when, from which step on, after how many seconds of earlier sessions, and the tokens of its steps. */
export interface Session {
  start: number
  step: number
  seconds: number
  tokens: number
}
