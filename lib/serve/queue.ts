import type { Submitted } from './messages.js'

/** A request in the engine's thread. */
export interface Waiting extends Submitted {
  /** The caller has given up. */
  cancelled: boolean
}

export interface BatchRules {
  /** Tokens of a batch; a request that has more is a batch of its own. */
  budget: number
  /** Whose request it is: requests of one owner are in one batch only if they go together, so that the later one finds a cached history. */
  ownerOf: (wire: unknown) => string
  together: (a: unknown, b: unknown) => boolean
}

/** Takes the next batch off the queue, in order of arrival. */
export function takeBatch(queue: Waiting[], { budget, ownerOf, together }: BatchRules): Waiting[] {
  const batch: Waiting[] = []
  const owners = new Map<string, Waiting>()
  const left: Waiting[] = []
  let tokens = 0
  for (const waiting of queue) {
    const owner = ownerOf(waiting.wire)
    const same = owners.get(owner)
    const fits = batch.length === 0 || tokens + waiting.tokens <= budget
    if (!fits || (same && !together(same.wire, waiting.wire))) {
      left.push(waiting)
      // An owner's later requests stay behind this one.
      if (!same) owners.set(owner, waiting)
      continue
    }
    if (same && left.includes(same)) {
      left.push(waiting)
      continue
    }
    batch.push(waiting)
    tokens += waiting.tokens
    if (!same) owners.set(owner, waiting)
  }
  queue.splice(0, queue.length, ...left)
  return batch
}
