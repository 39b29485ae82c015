/** What is to be done when a signal aborts, and what the signal calls then. */
interface Listener {
  fns: Set<() => void>
  call: () => void
}
const listeners = new WeakMap<AbortSignal, Listener>()

/**
 * Calls `fn` when the signal aborts. A signal has one listener, however many requests share it: Node warns of a leak at more than ten.
 * @returns what takes it back
 */
export function onceAborted(signal: AbortSignal, fn: () => void): () => void {
  const { fns, call } = listeners.get(signal) ?? listen(signal)
  fns.add(fn)
  return () => {
    fns.delete(fn)
    if (fns.size > 0 || listeners.get(signal)?.fns !== fns) return
    listeners.delete(signal)
    signal.removeEventListener('abort', call)
  }
}

function listen(signal: AbortSignal): Listener {
  const fns = new Set<() => void>()
  const call = () => {
    listeners.delete(signal)
    for (const fn of [...fns]) fn()
  }
  listeners.set(signal, { fns, call })
  signal.addEventListener('abort', call, { once: true })
  return { fns, call }
}
