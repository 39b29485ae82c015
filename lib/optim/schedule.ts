export interface ScheduleOptions {
  lr: number
  /** Steps of linear warm-up from 0. Default 0. */
  warmupSteps?: number
  /** After the warm-up: 'constant' (default), or 'cosine' down to 0 at the last step. */
  schedule?: 'constant' | 'cosine'
}

/** Learning rate of step `step` (from 1) of `totalSteps`. */
export function learningRate(step: number, totalSteps: number, options: ScheduleOptions): number {
  const { lr, warmupSteps = 0, schedule = 'constant' } = options
  if (step <= warmupSteps) return (lr * step) / warmupSteps
  if (schedule === 'constant') return lr
  const progress = (step - warmupSteps) / Math.max(1, totalSteps - warmupSteps)
  return (lr * (1 + Math.cos(Math.PI * Math.min(1, progress)))) / 2
}
