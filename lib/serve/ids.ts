/** Texts side by side: their UTF-16 code units, and where each ends. What crosses threads costs by its objects, not by its bytes. */
export interface TextIds {
  units: Uint16Array
  ends: Int32Array
}

/** Ids as they cross threads: texts, or whole numbers of 64 bits. */
export type WireIds = TextIds | BigInt64Array

export const idBytes = (ids: WireIds): number =>
  'ends' in ids ? ids.ends.byteLength + ids.units.byteLength : ids.byteLength
export const idCount = (ids: WireIds): number => ('ends' in ids ? ids.ends.length : ids.length)

/** Texts as they lie in a memory: where each ends, then the units of all. */
export const textsIn = (memory: ArrayBufferLike, count: number): TextIds => ({
  ends: new Int32Array(memory, 0, count),
  units: new Uint16Array(memory, 4 * count),
})

/** Texts that are put together and written at once: by the text, not by the unit, as far as a string may reach. */
const AT_ONCE = 1 << 16
const MOST_UNITS = 1 << 28

/** Of the elements from `first` on; null where one is no text. */
export function textIds(texts: readonly unknown[], first = 0): TextIds | null {
  let size = 0
  for (let i = first; i < texts.length; i++) {
    const text = texts[i]
    if (typeof text !== 'string') return null
    size += text.length
  }
  const count = texts.length - first
  const memory = new ArrayBuffer(4 * count + 2 * size)
  const { ends, units } = textsIn(memory, count)
  for (let i = 0, at = 0; i < count; i++) ends[i] = at += (texts[i + first] as string).length
  const bytes = Buffer.from(memory, 4 * count)
  const step = size < MOST_UNITS ? AT_ONCE : 1
  for (let i = first, at = 0; i < texts.length; i += step) {
    const part = i === 0 && count <= step ? texts : texts.slice(i, i + step)
    at += bytes.write(part.join(''), at, 'utf16le')
  }
  return { units, ends }
}

/** Id i as text, for an error or an answer. */
export function idText(ids: WireIds, i: number): string {
  if (!('ends' in ids)) return String(ids[i])
  const { buffer, byteOffset, byteLength } = ids.units.subarray(i === 0 ? 0 : ids.ends[i - 1]!, ids.ends[i]!)
  return Buffer.from(buffer, byteOffset, byteLength).toString('utf16le')
}

const bytesOf = ({ buffer, byteOffset, byteLength }: NodeJS.TypedArray) =>
  new Uint8Array(buffer, byteOffset, byteLength)
const sameBytes = (a: NodeJS.TypedArray, b: NodeJS.TypedArray) => Buffer.compare(bytesOf(a), bytesOf(b)) === 0

type Columns = readonly NodeJS.TypedArray[]
const inOneMemory = (all: Columns) => all.every(({ buffer }) => buffer === all[0]!.buffer)

/** Whether arrays have the same elements as others of the same kinds: by one comparison where each lie in one memory in the same way. */
export function sameColumns(a: Columns, b: Columns): boolean {
  if (!a.every(({ length }, k) => length === b[k]!.length)) return false
  const alike = inOneMemory(a) && inOneMemory(b) && a.every(({ byteOffset }, k) => byteOffset === b[k]!.byteOffset)
  if (alike && sameBytes(new Uint8Array(a[0]!.buffer), new Uint8Array(b[0]!.buffer))) return true
  return a.every((own, k) => sameBytes(own, b[k]!))
}

/** Whether two arrays of one kind have the same elements. */
export const sameValues = (a: NodeJS.TypedArray, b: NodeJS.TypedArray) => a.length === b.length && sameBytes(a, b)

export function sameIds(a: WireIds, b: WireIds): boolean {
  if ('ends' in a) return 'ends' in b && sameColumns([a.ends, a.units], [b.ends, b.units])
  return !('ends' in b) && sameValues(a, b)
}

/** Whether `all` begins with the ids of `first`. */
export function idsBegin(all: WireIds, first: WireIds): boolean {
  const count = idCount(first)
  if (count > idCount(all)) return false
  if (!('ends' in all)) return !('ends' in first) && sameValues(all.subarray(0, count), first)
  const { units, ends } = all
  return (
    'ends' in first && sameIds({ units: units.subarray(0, first.units.length), ends: ends.subarray(0, count) }, first)
  )
}
