/** What is to be done when a signal aborts. */
const waiting = new WeakMap<AbortSignal, Set<() => void>>()

/**
 * Calls `fn` when the signal aborts. A signal has one listener, however many requests share it: Node warns of a leak at more than ten.
 * @returns what takes it back
 */
export function onceAborted(signal: AbortSignal, fn: () => void): () => void {
  let all = waiting.get(signal)
  if (!all) {
    all = new Set()
    waiting.set(signal, all)
    signal.addEventListener('abort', callAll, { once: true })
  }
  const own = all
  own.add(fn)
  return () => {
    own.delete(fn)
    if (own.size > 0 || waiting.get(signal) !== own) return
    waiting.delete(signal)
    signal.removeEventListener('abort', callAll)
  }
}

function callAll(this: AbortSignal): void {
  const all = waiting.get(this)
  waiting.delete(this)
  for (const fn of [...(all ?? [])]) fn()
}
