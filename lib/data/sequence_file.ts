import { check } from '../errors.js'
import type { SequenceDataset } from './dataset.js'
import { dataError, probeFile, quoted, readLines, throwIfAborted } from './files.js'

/** @see loadSequenceFile */
export interface SequenceFileOptions {
  /** File of the same lines with a time in place of each item. */
  times?: string
  /** Users with fewer actions are skipped; default 3. */
  minActions?: number
  name: string
  signal?: AbortSignal
  onRows?: (rows: number) => void
}

/**
 * Reads `user item item ...`, a user a line, separated by white space. The order of the file is the order of the
 * actions: its times are often of a coarser grain (days), and sorting by them would throw the real order away.
 *
 * @throws HstuError ERR_HSTU_DATA with file and line; see `loadDataset`.
 */
export async function loadSequenceFile(path: string, options: SequenceFileOptions): Promise<SequenceDataset> {
  const { minActions = 3, signal, onRows } = options
  throwIfAborted(signal)
  if ((await probeFile(path)) !== 'text') throw dataError(path, null, 'expected plain text for a sequence file')
  const timeFile = options.times ? await openTimes(options.times) : null
  const lineOf = new Map<string, number>()
  const numberOf = new Map<string, number>()
  const userIds: string[] = []
  const itemIds = ['']
  const offsets: number[] = [0]
  let items = new Int32Array(1024)
  let times = timeFile ? new BigInt64Array(1024) : null
  const stats = { rows: 0, skippedUsers: 0, skippedActions: 0, outOfOrder: 0, minActions, warnings: [] as string[] }
  let length = 0
  let line = 0
  try {
    for await (const text of readLines(path)) {
      line++
      if (line % 4096 === 0) {
        throwIfAborted(signal)
        onRows?.(stats.rows)
      }
      const words = splitWords(text)
      if (words.length === 0) continue
      const user = words[0]!
      const count = words.length - 1
      if (count === 0) throw dataError(path, line, `expected items after user ${quoted(user)}, found none`)
      const earlier = lineOf.get(user)
      if (earlier !== undefined) {
        throw dataError(path, line, `expected one line a user, but user ${quoted(user)} has line ${earlier} too`)
      }
      lineOf.set(user, line)
      const userTimes = timeFile ? await timeFile.next(user, count, path, line) : null
      stats.rows += count
      if (count < minActions) {
        stats.skippedUsers++
        stats.skippedActions += count
        continue
      }
      check(length + count < 2 ** 31, 'ERR_HSTU_DATA', () => `${path}: more than 2^31 - 1 actions`)
      if (length + count > items.length) {
        items = grow(new Int32Array(Math.max(items.length * 2, length + count)), items)
        if (times) times = grow(new BigInt64Array(items.length), times)
      }
      for (let k = 0; k < count; k++) {
        const id = words[k + 1]!
        let item = numberOf.get(id)
        if (item === undefined) {
          item = itemIds.length
          numberOf.set(id, item)
          itemIds.push(id)
        }
        items[length + k] = item
        if (times && userTimes) {
          times[length + k] = BigInt(userTimes[k]!)
          if (k > 0 && userTimes[k]! < userTimes[k - 1]!) stats.outOfOrder++
        }
      }
      length += count
      userIds.push(user)
      offsets.push(length)
    }
    await timeFile?.end(path)
  } finally {
    await timeFile?.close()
  }
  if (stats.rows === 0) throw dataError(path, null, 'no rows: expected lines of a user and its items')
  if (length === 0) throw dataError(path, null, `no user has ${minActions} actions or more (minActions)`)
  onRows?.(stats.rows)
  if (stats.outOfOrder > 0) {
    stats.warnings.push(`${stats.outOfOrder} actions are earlier than the one before; the order of the file is kept`)
  }
  if (timeFile) stats.warnings.push(...timeFile.warnings())
  return {
    name: options.name,
    numUsers: userIds.length,
    numItems: itemIds.length - 1,
    userIds,
    itemIds,
    offsets: Int32Array.from(offsets),
    items: items.slice(0, length),
    times: times ? times.slice(0, length) : null,
    ratings: null,
    stats,
  }
}

function splitWords(text: string): string[] {
  const trimmed = text.trim()
  return trimmed === '' ? [] : trimmed.split(/\s+/)
}

function grow<A extends Int32Array | BigInt64Array>(to: A, from: A): A {
  ;(to as Int32Array).set(from as Int32Array)
  return to
}

/** Above this, seconds lie beyond the year 5000: the file most likely counts milliseconds or finer. */
export const MAX_PLAUSIBLE_SECONDS = 1e11
/** Above this, a double no longer holds every whole second. */
export const MAX_SECONDS = 9e15

/** The warning for {@link MAX_PLAUSIBLE_SECONDS}. */
export function unitWarning(latest: number): string {
  return `times up to ${latest} look like milliseconds or finer; they are read as seconds all the same`
}

/** The warning for times with a fraction. */
export function fractionWarning(count: number): string {
  return `${count} times have a fraction of a second, which was cut off`
}

/** Walks the times file in step with the sequence file; blank lines of either do not count. */
async function openTimes(path: string) {
  if ((await probeFile(path)) !== 'text') throw dataError(path, null, 'expected plain text for a times file')
  const lines = readLines(path)
  let line = 0
  let fractions = 0
  let latest = 0
  const nextWords = async (): Promise<string[] | null> => {
    for (;;) {
      const { value, done } = await lines.next()
      if (done) return null
      line++
      const words = splitWords(value)
      if (words.length > 0) return words
    }
  }
  return {
    async next(user: string, count: number, sequences: string, at: number): Promise<number[]> {
      const words = await nextWords()
      if (!words)
        throw dataError(
          path,
          line + 1,
          `expected the times of user ${quoted(user)} (${sequences}:${at}), found the end`,
        )
      if (words[0] !== user) {
        throw dataError(
          path,
          line,
          `expected user ${quoted(user)} as in ${sequences}:${at}, found ${quoted(words[0]!)}`,
        )
      }
      if (words.length - 1 !== count) {
        throw dataError(
          path,
          line,
          `expected ${count} times for user ${quoted(user)} as in ${sequences}:${at}, found ${words.length - 1}`,
        )
      }
      return words.slice(1).map(word => {
        const time = Number(word)
        if (!(Math.abs(time) <= MAX_SECONDS))
          throw dataError(path, line, `expected a time in seconds, found ${quoted(word)}`)
        if (!Number.isInteger(time)) fractions++
        latest = Math.max(latest, time)
        return Math.floor(time)
      })
    },
    async end(sequences: string): Promise<void> {
      const words = await nextWords()
      if (words) throw dataError(path, line, `expected the end as in ${sequences}, found user ${quoted(words[0]!)}`)
    },
    async close(): Promise<void> {
      await lines.return(undefined)
    },
    warnings(): string[] {
      const found: string[] = []
      if (fractions > 0) found.push(fractionWarning(fractions))
      if (latest > MAX_PLAUSIBLE_SECONDS) found.push(unitWarning(latest))
      return found
    },
  }
}
