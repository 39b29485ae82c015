import { createHash, type Hash } from 'node:crypto'
import { constants } from 'node:fs'
import { type FileHandle, open, rm } from 'node:fs/promises'
import { HstuError } from '../errors.js'
import type { Dtype, Tensor, TypedArray } from '../tensor.js'

/** A dense row-major tensor in host memory. bfloat16 and float16 are a `Uint16Array` of their bits. */
export interface HostTensor {
  dtype: Dtype
  shape: readonly number[]
  data: TypedArray
}

/** What the writer takes: a `Tensor` is read when its turn comes, so only one is held twice at a time. */
export type WritableTensor = HostTensor | Pick<Tensor, 'dtype' | 'shape' | 'data'>

/** One tensor as the header describes it; `dtype` is the code in the file, which may be one that this package cannot hold. */
export interface SafetensorsEntry {
  dtype: string
  shape: readonly number[]
  /** Position of the first byte in the file. */
  position: number
  bytes: number
}

export interface SafetensorsHeader {
  tensors: Map<string, SafetensorsEntry>
  metadata: Record<string, string>
}

const formats = {
  float32: { code: 'F32', array: Float32Array },
  float64: { code: 'F64', array: Float64Array },
  bfloat16: { code: 'BF16', array: Uint16Array },
  float16: { code: 'F16', array: Uint16Array },
  int32: { code: 'I32', array: Int32Array },
  int64: { code: 'I64', array: BigInt64Array },
} as const
const dtypes = new Map<string, Dtype>(Object.entries(formats).map(([dtype, { code }]) => [code, dtype as Dtype]))

// Every dtype of the format with whole bytes an element: also what we cannot hold is checked. The digits are the bits.
const known = 'BOOL U8 I8 F8_E4M3 F8_E5M2 F8_E8M0 U16 I16 F16 BF16 U32 I32 F32 U64 I64 F64 C64'.split(' ')
const elementBytes = new Map(known.map(code => [code, Number(/\d+/.exec(code)?.[0] ?? 8) / 8]))

const MAX_HEADER_BYTES = 100_000_000
/** One read or write; also what is hashed at once, so that the event loop gets its turn between two. */
const CHUNK_BYTES = 8 << 20

function failure(path: string, message: string, cause?: unknown): HstuError {
  return new HstuError('ERR_HSTU_CHECKPOINT', `${path}: ${message}`, cause === undefined ? undefined : { cause })
}

function describe(value: unknown): string {
  const text = JSON.stringify(value) ?? String(value)
  return text.length > 80 ? `${text.slice(0, 80)}...` : text
}

const isObject = (value: unknown): value is Record<string, unknown> =>
  typeof value === 'object' && value !== null && !Array.isArray(value)
/** A non-negative whole number, and not -0: what a dim or an offset is. */
const isSize = (value: unknown): value is number =>
  Number.isSafeInteger(value) && Object.is(Math.abs(value as number), value)

/** Elements of a shape; Infinity where they are beyond 2^53. */
function sizeOf(shape: readonly number[]): number {
  const size = shape.includes(0) ? 0 : shape.reduce((a, b) => a * b, 1)
  return size <= Number.MAX_SAFE_INTEGER ? size : Infinity
}

/** Bytes of the tensor's data, once all that the header will say of it is known to be valid. */
function checkWritable(path: string, name: string, { dtype, shape }: WritableTensor): number {
  if (!Object.hasOwn(formats, dtype)) throw failure(path, `tensor '${name}': unknown dtype ${describe(dtype)}`)
  if (name === '__metadata__') throw failure(path, "no tensor can have the name '__metadata__' in this format")
  if (/\p{Surrogate}/u.test(name)) throw failure(path, `tensor ${describe(name)}: the name is not valid Unicode`)
  if (!shape.every(isSize) || sizeOf(shape) === Infinity)
    throw failure(path, `tensor '${name}': expected a shape of sizes, found ${describe(shape)}`)
  return sizeOf(shape) * formats[dtype].array.BYTES_PER_ELEMENT
}

/** The values of `tensor` as bytes. Hosts of this package are little-endian, as the format is. */
async function bytesOf(path: string, name: string, tensor: WritableTensor, bytes: number): Promise<Uint8Array> {
  const data = typeof tensor.data === 'function' ? await tensor.data() : tensor.data
  const { array } = formats[tensor.dtype]
  if (!(data instanceof array) || data.byteLength !== bytes) {
    const found = ArrayBuffer.isView(data) ? `${data.constructor.name} of ${data.length}` : describe(data)
    const expected = `${array.name} of ${bytes / array.BYTES_PER_ELEMENT}`
    throw failure(path, `tensor '${name}': expected a ${expected} values, found ${found}`)
  }
  return new Uint8Array(data.buffer, data.byteOffset, data.byteLength)
}

async function writeAll(file: FileHandle, bytes: Uint8Array, hash: Hash): Promise<void> {
  for (let at = 0; at < bytes.length; ) {
    const { bytesWritten } = await file.write(bytes.subarray(at, at + CHUNK_BYTES))
    hash.update(bytes.subarray(at, (at += bytesWritten)))
  }
}

/**
 * Writes `tensors` to the new file `path`, one after the other, and returns once the file is on the disk (fsync). A failure
 * removes what was written.
 *
 * @param tensors - must not be changed or disposed until the promise settles.
 * @returns size and SHA-256 (hex) of the file.
 * @throws HstuError ERR_HSTU_CHECKPOINT when `path` exists or cannot be written, or a tensor's data is not what its dtype and
 * shape say.
 */
export async function writeSafetensors(
  path: string,
  tensors: Record<string, WritableTensor> | ReadonlyMap<string, WritableTensor>,
  metadata: Record<string, string> = {},
): Promise<{ bytes: number; sha256: string }> {
  const named = (tensors instanceof Map ? [...tensors] : Object.entries(tensors)) as [string, WritableTensor][]
  const entries = named.map(([name, tensor]) => ({ name, tensor, bytes: checkWritable(path, name, tensor) }))
  // Wide elements first: then every tensor is aligned in the file, and readers that map it can use it in place.
  const width = (tensor: WritableTensor) => formats[tensor.dtype].array.BYTES_PER_ELEMENT
  entries.sort((a, b) => width(b.tensor) - width(a.tensor))
  for (const [key, value] of Object.entries(metadata))
    if (typeof value !== 'string') throw failure(path, `metadata '${key}': expected a string, found ${describe(value)}`)
  const fields: [string, unknown][] = Object.keys(metadata).length ? [['__metadata__', metadata]] : []
  let end = 0
  for (const { name, tensor, bytes } of entries) {
    const offsets = [end, (end += bytes)]
    fields.push([name, { dtype: formats[tensor.dtype].code, shape: tensor.shape, data_offsets: offsets }])
  }
  if (!Number.isSafeInteger(end)) throw failure(path, 'the tensors together are beyond 2^53 bytes')
  const json = Buffer.from(JSON.stringify(Object.fromEntries(fields)))
  const head = Buffer.alloc(8 + Math.ceil(json.length / 8) * 8, ' ')
  if (head.length - 8 > MAX_HEADER_BYTES) throw failure(path, `a header of ${json.length} bytes is too long`)
  head.writeBigUInt64LE(BigInt(head.length - 8))
  json.copy(head, 8)
  const hash = createHash('sha256')
  let file: FileHandle | undefined
  try {
    file = await open(path, 'wx')
    await writeAll(file, head, hash)
    for (const { name, tensor, bytes } of entries) await writeAll(file, await bytesOf(path, name, tensor, bytes), hash)
    await file.sync()
    await file.close()
  } catch (cause) {
    await file?.close().catch(() => {})
    if (file) await rm(path, { force: true }).catch(() => {})
    if (cause instanceof HstuError && cause.code === 'ERR_HSTU_CHECKPOINT') throw cause
    throw failure(path, `cannot be written: ${(cause as Error).message}`, cause)
  }
  return { bytes: head.length + end, sha256: hash.digest('hex') }
}

/**
 * What is wrong with the JSON text before it is parsed: `JSON.parse` keeps the last of two equal keys without a word, and builds
 * nested arrays of many times the memory of their text.
 */
function structureProblem(text: string): string | null {
  const open: (Set<string> | null)[] = []
  const colon = /[ \t\r\n]*:/y
  for (let i = 0; i < text.length; i++) {
    const c = text[i]
    if (c === '{' || c === '[') {
      open.push(c === '{' ? new Set() : null)
      if (open.length > 3) return 'it is nested deeper than a safetensors header'
    } else if (c === '}' || c === ']') open.pop()
    else if (c === '"') {
      const begin = i++
      while (i < text.length && text[i] !== '"') i += text[i] === '\\' ? 2 : 1
      const keys = open.at(-1)
      colon.lastIndex = i + 1
      if (!keys || !colon.test(text)) continue
      const key = JSON.parse(text.slice(begin, i + 1)) as string
      if (keys.has(key)) return `it names ${describe(key)} twice`
      keys.add(key)
    }
  }
  return null
}

function parseEntry(path: string, name: string, value: unknown, start: number, fileBytes: number): SafetensorsEntry {
  const wrong = (expected: string, found: unknown) =>
    failure(path, `tensor ${describe(name)}: expected ${expected}, found ${describe(found)}`)
  if (!isObject(value)) throw wrong('an object with dtype, shape and data_offsets', value)
  const { dtype, shape, data_offsets: offsets, ...others } = value
  for (const key of Object.keys(others)) throw wrong('only dtype, shape and data_offsets', key)
  const width = typeof dtype === 'string' ? elementBytes.get(dtype) : undefined
  if (width === undefined) throw wrong(`a dtype of ${[...elementBytes.keys()].join(', ')}`, dtype)
  if (!Array.isArray(shape) || !shape.every(isSize)) throw wrong('a shape of non-negative whole numbers', shape)
  if (!Array.isArray(offsets) || offsets.length !== 2 || !offsets.every(isSize))
    throw wrong('data_offsets of two non-negative whole numbers', offsets)
  const [begin, end] = offsets as [number, number]
  const room = fileBytes - start
  if (begin > end || end > room) throw wrong(`data_offsets within the ${room} bytes of data in the file`, offsets)
  const bytes = sizeOf(shape) * width
  if (bytes !== end - begin) throw wrong(`data_offsets over the ${bytes} bytes of its shape`, offsets)
  return { dtype: dtype as string, shape, position: start + begin, bytes }
}

function parseHeader(path: string, json: Uint8Array, fileBytes: number): SafetensorsHeader {
  let parsed: Record<string, unknown>
  try {
    if (json[0] !== 0x7b) throw new Error("it does not begin with '{'")
    const text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(json)
    const problem = structureProblem(text)
    if (problem) throw new Error(problem)
    parsed = JSON.parse(text)
  } catch (cause) {
    throw failure(path, `expected a header of JSON in UTF-8: ${(cause as Error).message}`, cause)
  }
  const metadata = Object.hasOwn(parsed, '__metadata__') ? parsed.__metadata__ : {}
  if (!isObject(metadata) || !Object.values(metadata).every(value => typeof value === 'string'))
    throw failure(path, `expected __metadata__ to be an object of strings, found ${describe(metadata)}`)
  const tensors = new Map<string, SafetensorsEntry>()
  let end = 8 + json.length
  for (const [name, value] of Object.entries(parsed))
    if (name !== '__metadata__') tensors.set(name, parseEntry(path, name, value, end, fileBytes))
  for (const [name, { position, bytes }] of byPosition(tensors)) {
    if (position !== end) {
      const what = position < end ? 'overlaps the tensor before it' : `leaves a hole of ${position - end} bytes`
      throw failure(path, `tensor ${describe(name)}: expected its data at byte ${end}, found ${position}: it ${what}`)
    }
    end += bytes
  }
  if (end !== fileBytes) throw failure(path, `expected a file of ${end} bytes by its header, found ${fileBytes}`)
  return { tensors, metadata: metadata as Record<string, string> }
}

function byPosition(tensors: Map<string, SafetensorsEntry>): [string, SafetensorsEntry][] {
  // An empty tensor starts where its neighbour does, and must come first for the data to be contiguous.
  return [...tensors].sort(([, a], [, b]) => a.position - b.position || a.bytes - b.bytes)
}

/** Reads into a buffer of its own, so that any element type is aligned in it. */
async function readBytes(file: FileHandle, path: string, begin: number, bytes: number, hash?: Hash) {
  const buffer = new ArrayBuffer(bytes)
  for (let at = 0; at < bytes; ) {
    const chunk = new Uint8Array(buffer, at, Math.min(CHUNK_BYTES, bytes - at))
    const { bytesRead } = await file.read(chunk, 0, chunk.length, begin + at)
    if (bytesRead === 0) throw failure(path, `ends at byte ${begin + at}: expected ${bytes - at} bytes more there`)
    hash?.update(chunk.subarray(0, bytesRead))
    at += bytesRead
  }
  return buffer
}

type Reader<R> = (file: FileHandle, header: SafetensorsHeader) => R | Promise<R>

/** Opens `path` and checks its header before `read` gets the file; `hash` takes the bytes up to the data. */
async function withFile<R>(path: string, read: Reader<R>, hash?: Hash): Promise<R> {
  let file: FileHandle | undefined
  try {
    // Without O_NONBLOCK a named pipe would wait for its writer forever.
    file = await open(path, constants.O_RDONLY | (constants.O_NONBLOCK ?? 0))
    const info = await file.stat()
    const kind = info.isFile() ? `${info.size} bytes` : info.isDirectory() ? 'a folder' : 'a device'
    if (!info.isFile() || info.size < 8) throw failure(path, `expected a safetensors file, found ${kind}`)
    const length = new DataView(await readBytes(file, path, 0, 8, hash)).getBigUint64(0, true)
    const limit = Math.min(info.size - 8, MAX_HEADER_BYTES)
    if (length > BigInt(limit))
      throw failure(path, `expected a header of at most ${limit} bytes, found ${length}: truncated or not safetensors`)
    const json = new Uint8Array(await readBytes(file, path, 8, Number(length), hash))
    return await read(file, parseHeader(path, json, info.size))
  } catch (cause) {
    throw cause instanceof HstuError ? cause : failure(path, `cannot be read: ${(cause as Error).message}`, cause)
  } finally {
    await file?.close().catch(() => {})
  }
}

/** Reads and checks the header alone, as strictly as `readSafetensors`. @throws HstuError ERR_HSTU_CHECKPOINT */
export async function readSafetensorsHeader(path: string): Promise<SafetensorsHeader> {
  return withFile(path, (_, header) => header)
}

/**
 * Reads a safetensors file into host memory. Nothing is allocated for data before the header is known to fit the file.
 *
 * @param options.sha256 - the hash (hex) that the file must have.
 * @throws HstuError ERR_HSTU_CHECKPOINT for a file that breaks the format in any way, has another hash, or holds a dtype that
 * this package has no tensors of.
 */
export async function readSafetensors(
  path: string,
  options: { sha256?: string } = {},
): Promise<{ tensors: Map<string, HostTensor>; metadata: Record<string, string> }> {
  const hash = options.sha256 === undefined ? undefined : createHash('sha256')
  const read = async (file: FileHandle, { tensors: entries, metadata }: SafetensorsHeader) => {
    const tensors = new Map<string, HostTensor>()
    for (const [name, { dtype: code, shape, position, bytes }] of byPosition(entries)) {
      const dtype = dtypes.get(code)
      if (!dtype) throw failure(path, `tensor '${name}': expected one of ${[...dtypes.keys()]}, found dtype ${code}`)
      const buffer = await readBytes(file, path, position, bytes, hash)
      tensors.set(name, { dtype, shape, data: new formats[dtype].array(buffer) })
    }
    const found = hash?.digest('hex')
    if (found !== options.sha256)
      throw failure(
        path,
        `the file is damaged or not the one saved: expected SHA-256 ${options.sha256}, found ${found}`,
      )
    return { tensors, metadata }
  }
  return withFile(path, read, hash)
}
