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
  const left: Waiting[] = []
  /** What each owner has in the batch; null: something of theirs stays behind, and all that comes after it. */
  const owners = new Map<string, Waiting | null>()
  let tokens = 0
  for (const waiting of queue) {
    const owner = ownerOf(waiting.wire)
    const own = owners.get(owner)
    const fits = batch.length === 0 || tokens + waiting.tokens <= budget
    if (fits && own !== null && (!own || together(own.wire, waiting.wire))) {
      batch.push(waiting)
      tokens += waiting.tokens
      owners.set(owner, waiting)
    } else {
      left.push(waiting)
      owners.set(owner, null)
    }
  }
  queue.splice(0, queue.length, ...left)
  return batch
}
