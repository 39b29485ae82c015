import { HstuError } from '../errors.js'

/** Package runners pass on a signal that the terminal has sent already; nobody presses twice this fast. */
const SAME_PRESS_MS = 500

export const EXIT_INTERRUPTED = 130

/**
 * Runs `work` with a signal that fires at the first Ctrl-C (or SIGTERM), so that it can end in order; the second kills at once.
 * Work that gives up with ERR_HSTU_ABORTED ends with exit code 130 after `onAbort`.
 */
export async function interruptible(
  work: (signal: AbortSignal) => Promise<number | undefined>,
  onAbort: () => void = () => void process.stderr.write('interrupted\n'),
): Promise<number | undefined> {
  const controller = new AbortController()
  let first = 0
  const handle = () => {
    if (first === 0) {
      first = performance.now()
      process.stderr.write('\nstopping; once more to kill\n')
      controller.abort()
    } else if (performance.now() - first > SAME_PRESS_MS) process.exit(EXIT_INTERRUPTED)
  }
  process.on('SIGINT', handle)
  process.on('SIGTERM', handle)
  try {
    return await work(controller.signal)
  } catch (error) {
    if (!(error instanceof HstuError && error.code === 'ERR_HSTU_ABORTED')) throw error
    onAbort()
    return EXIT_INTERRUPTED
  } finally {
    process.off('SIGINT', handle)
    process.off('SIGTERM', handle)
  }
}
