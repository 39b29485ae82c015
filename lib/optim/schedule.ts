export interface ScheduleOptions {
  lr: number
  /** Steps of linear warm-up from 0. Default 0. */
  warmupSteps?: number
  /** After the warm-up: 'constant' (default), or 'cosine' down to `finalShare` of it at the last step. */
  schedule?: 'constant' | 'cosine'
  /** Share of `lr` that the cosine ends at. Default 0. */
  finalShare?: number
}

/** Learning rate of step `step` (from 1) of `totalSteps`. */
export function learningRate(step: number, totalSteps: number, options: ScheduleOptions): number {
  const { lr, warmupSteps = 0, schedule = 'constant', finalShare = 0 } = options
  if (step <= warmupSteps) return (lr * step) / warmupSteps
  if (schedule === 'constant') return lr
  const progress = (step - warmupSteps) / Math.max(1, totalSteps - warmupSteps)
  const share = (1 + Math.cos(Math.PI * Math.min(1, progress))) / 2
  return lr * (finalShare + (1 - finalShare) * share)
}
