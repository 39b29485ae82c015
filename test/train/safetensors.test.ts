import { createHash } from 'node:crypto'
import { mkdtempSync } from 'node:fs'
import { readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, it } from 'vitest'
import { HstuError } from '#lib/errors.js'
import { Tensor } from '#lib/tensor.js'
import { type HostTensor, readSafetensors, readSafetensorsHeader, writeSafetensors } from '#lib/train/safetensors.js'

const folder = mkdtempSync(join(tmpdir(), 'hstu-safetensors-'))
let count = 0
const fresh = () => join(folder, `${count++}.safetensors`)
afterAll(() => rm(folder, { recursive: true }))

const every: Record<string, HostTensor> = {
  'half.bf16': { dtype: 'bfloat16', shape: [3], data: Uint16Array.of(0x3f80, 0x7fc0, 0xff80) },
  'half.f16': { dtype: 'float16', shape: [1, 2], data: Uint16Array.of(0x3c00, 0xfc00) },
  f32: { dtype: 'float32', shape: [2, 3], data: Float32Array.of(1, -0, Number.NaN, Infinity, 1e-45, 3) },
  f64: { dtype: 'float64', shape: [2], data: Float64Array.of(Math.PI, -Infinity) },
  i32: { dtype: 'int32', shape: [2, 1], data: Int32Array.of(-(2 ** 31), 2 ** 31 - 1) },
  i64: { dtype: 'int64', shape: [2], data: BigInt64Array.of(-(2n ** 63n), 2n ** 63n - 1n) },
  scalar: { dtype: 'float32', shape: [], data: Float32Array.of(7) },
  empty: { dtype: 'float64', shape: [0], data: new Float64Array() },
  'empty too': { dtype: 'int32', shape: [4, 0, 2], data: new Int32Array() },
  'ünï "quoted" \\ \n 模型 😀': { dtype: 'int32', shape: [1], data: Int32Array.of(5) },
  '': { dtype: 'int32', shape: [1], data: Int32Array.of(8) },
  '17': { dtype: 'int32', shape: [1], data: Int32Array.of(9) },
}

const bits = ({ data }: HostTensor) => Buffer.from(data.buffer, data.byteOffset, data.byteLength).toString('hex')
function expectEqual(found: ReadonlyMap<string, HostTensor>, expected: ReadonlyMap<string, HostTensor>): void {
  expect([...found.keys()].sort()).toEqual([...expected.keys()].sort())
  for (const [name, { dtype, shape, data }] of found) {
    expect({ name, dtype, shape }).toEqual({ name, dtype: expected.get(name)!.dtype, shape: expected.get(name)!.shape })
    expect(data.constructor).toBe(expected.get(name)!.data.constructor)
    expect(bits({ dtype, shape, data })).toBe(bits(expected.get(name)!))
  }
}

/** A file of any header (an object, or its text) before any data. */
async function forge(header: unknown, data: Uint8Array = new Uint8Array(), length?: bigint): Promise<string> {
  const text = Buffer.isBuffer(header)
    ? header
    : Buffer.from(typeof header === 'string' ? header : JSON.stringify(header))
  const head = Buffer.alloc(8)
  head.writeBigUInt64LE(length ?? BigInt(text.length))
  const path = fresh()
  await writeFile(path, Buffer.concat([head, text, data]))
  return path
}

/** Reads, and gives what was read or the typed error; fails on any other error and on memory taken beyond the file's size. */
async function attempt(path: string, options?: { sha256?: string }) {
  const { size } = await stat(path)
  const Real = globalThis.ArrayBuffer
  let allocated = 0
  globalThis.ArrayBuffer = new Proxy(Real, {
    construct(target, [bytes], self) {
      allocated += Number(bytes)
      if (allocated > size) throw new Error(`allocated ${allocated} bytes for a file of ${size}`)
      return Reflect.construct(target, [bytes], self === globalThis.ArrayBuffer ? target : self)
    },
  })
  try {
    const read = await readSafetensors(path, options)
    expect(allocated).toBe(size)
    return read
  } catch (error) {
    if (!(error instanceof HstuError) || /allocated/.test(error.message)) throw error
    // A mistake of the reader itself; the decoder's complaint about UTF-8 is a TypeError with a code.
    if (error.cause instanceof TypeError && !('code' in error.cause)) throw error
    expect(error.code).toBe('ERR_HSTU_CHECKPOINT')
    expect(error.message).toContain(path)
    return error
  } finally {
    globalThis.ArrayBuffer = Real
  }
}

describe('round trip', () => {
  it('keeps every dtype, shape, name and bit, and the metadata', async () => {
    const path = fresh()
    const metadata = { format: 'x', note: 'zwei\n"lines"' }
    const { bytes, sha256 } = await writeSafetensors(path, every, metadata)
    const file = await readFile(path)
    expect(bytes).toBe(file.length)
    expect(sha256).toBe(createHash('sha256').update(file).digest('hex'))
    const read = await readSafetensors(path, { sha256 })
    expect({ ...read.metadata }).toEqual(metadata)
    expectEqual(read.tensors, new Map(Object.entries(every)))
    for (const { data } of read.tensors.values()) expect(data.byteOffset).toBe(0)
    const header = await readSafetensorsHeader(path)
    expect(header.tensors.get('i64')).toMatchObject({ dtype: 'I64', shape: [2], bytes: 16 })
    expect(file.readBigUInt64LE() % 8n).toBe(0n)
    for (const { position, dtype } of header.tensors.values()) expect(position % (/64/.test(dtype) ? 8 : 2)).toBe(0)
  })

  it('takes a map, tensors, views into larger buffers, and nothing at all', async () => {
    const view = new Float32Array([0, 1, 2, 3]).subarray(1, 3)
    const tensor = Tensor.from([1.5, 2.5], [2, 1])
    const path = fresh()
    await writeSafetensors(path, new Map([['__proto__', { dtype: 'float32' as const, shape: [2], data: view }]]))
    expect((await readSafetensors(path)).tensors.get('__proto__')!.data).toEqual(Float32Array.of(1, 2))
    const other = fresh()
    await writeSafetensors(other, { tensor })
    tensor.dispose()
    const expected: HostTensor = { dtype: 'float32', shape: [2, 1], data: Float32Array.of(1.5, 2.5) }
    expectEqual((await readSafetensors(other)).tensors, new Map([['tensor', expected]]))
    const none = fresh()
    expect((await writeSafetensors(none, {})).bytes).toBe(16)
    expect((await readSafetensors(none)).tensors.size).toBe(0)
  })

  it('goes over several chunks', async () => {
    const data = Float64Array.from({ length: 2_500_001 }, (_, i) => Math.sqrt(i))
    const path = fresh()
    const { sha256 } = await writeSafetensors(path, { data: { dtype: 'float64', shape: [data.length], data } })
    const { tensors } = await readSafetensors(path, { sha256 })
    expect(Buffer.from(tensors.get('data')!.data.buffer).equals(Buffer.from(data.buffer))).toBe(true)
  })

  it("reads another writer's file: no padding, keys unsorted, dtypes unaligned, white space, spare dims", async () => {
    const data = Buffer.alloc(2 + 4 + 8)
    data.writeUInt16LE(0x3f80, 0)
    data.writeFloatLE(2.5, 2)
    data.writeBigInt64LE(-3n, 6)
    const text = `{"c":{"data_offsets":[6,14],"shape":[1,1,1],"dtype":"I64"},
      "a": {"dtype":"BF16", "shape":[1], "data_offsets":[0,2]}, "none":{"dtype":"F32","shape":[0],"data_offsets":[6,6]},
      "__metadata__":{"format":"pt"},\t"b":{"shape":[],"dtype":"F32","data_offsets":[2,6]}}   `
    const { tensors, metadata } = await readSafetensors(await forge(text, data))
    expect(metadata.format).toBe('pt')
    const expected = new Map<string, HostTensor>([
      ['a', { dtype: 'bfloat16', shape: [1], data: Uint16Array.of(0x3f80) }],
      ['b', { dtype: 'float32', shape: [], data: Float32Array.of(2.5) }],
      ['c', { dtype: 'int64', shape: [1, 1, 1], data: BigInt64Array.of(-3n) }],
      ['none', { dtype: 'float32', shape: [0], data: new Float32Array() }],
    ])
    expectEqual(tensors, expected)
  })

  it('describes dtypes that it cannot hold, and does not read them', async () => {
    const path = await forge({ mask: { dtype: 'BOOL', shape: [3], data_offsets: [0, 3] } }, new Uint8Array(3))
    expect((await readSafetensorsHeader(path)).tensors.get('mask')).toMatchObject({ dtype: 'BOOL', bytes: 3 })
    await expect(readSafetensors(path)).rejects.toThrow(/'mask'.*F32.*BOOL/)
  })
})

describe('writing', () => {
  const one = (fields: object) => ({ t: { ...every.f32!, ...fields } as HostTensor })
  it.each([
    ['too few values', one({ shape: [7] }), /'t'.*7 values, found Float32Array of 6/],
    ['other array', one({ dtype: 'int32' }), /'t'.*Int32Array of 6.*Float32Array/],
    ['unknown dtype', one({ dtype: 'complex' }), /'t'.*complex/],
    ['negative dim', one({ shape: [-2, -3] }), /'t'.*shape/],
    ['huge shape', one({ shape: [2 ** 40, 2 ** 40] }), /'t'.*shape/],
    ['reserved name', { __metadata__: every.f32! }, /__metadata__/],
    ['lone surrogate', { '\ud800': every.f32! }, /Unicode/],
  ])('refuses: %s', async (_, tensors, message) => {
    const path = fresh()
    await expect(writeSafetensors(path, tensors)).rejects.toMatchObject({
      code: 'ERR_HSTU_CHECKPOINT',
      message: expect.stringMatching(message),
    })
    await expect(readFile(path)).rejects.toThrow('ENOENT')
  })

  it('never replaces a file, and removes what it could not finish', async () => {
    const path = fresh()
    await writeFile(path, 'mine')
    await expect(writeSafetensors(path, every)).rejects.toMatchObject({ cause: { code: 'EEXIST' } })
    expect(await readFile(path, 'utf8')).toBe('mine')
    const before = await readdir(folder)
    const broken = { dtype: 'float32' as const, shape: [1], data: () => Promise.reject(new Error('lost')) }
    await expect(writeSafetensors(fresh(), { a: every.f64!, broken })).rejects.toThrow(/cannot be written: lost/)
    expect(await readdir(folder)).toEqual(before)
  })
})

describe('a file that breaks the format', () => {
  const entry = (fields: object = {}) => ({ dtype: 'F32', shape: [2], data_offsets: [0, 8], ...fields })
  const cases: [string, unknown, number, RegExp][] = [
    ['not JSON', '{"a":', 0, /JSON/],
    ['an array', '[]', 0, /begin with '{'/],
    ['leading space', ' {}', 0, /begin with '{'/],
    ['not UTF-8', Buffer.from('{"\xff":1}', 'latin1'), 0, /UTF-8/],
    ['data without tensors', {}, 5, /13|15/],
    ['same name twice', `{"a":${JSON.stringify(entry())},"\\u0061" :${JSON.stringify(entry())}}`, 8, /"a" twice/],
    ['same field twice', '{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', 8, /"dtype" twice/],
    ['deep nesting', `{"a":${'['.repeat(1e6)}`, 0, /nested/],
    ['deep objects', `{"a":${'{"b":'.repeat(1e5)}`, 0, /nested/],
    ['entry not an object', { a: [1] }, 0, /"a".*object/],
    ['missing fields', { a: {} }, 0, /"a".*dtype/],
    ['unknown field', { a: entry({ strides: [1] }) }, 8, /strides/],
    ['unknown dtype', { a: entry({ dtype: 'F33' }) }, 8, /"a".*F33/],
    ['dtype of a prototype', { a: entry({ dtype: 'toString' }) }, 8, /toString/],
    ['dtype not text', { a: entry({ dtype: ['F32'] }) }, 8, /dtype/],
    ['negative dim', { a: entry({ shape: [-2] }) }, 8, /shape/],
    ['two negative dims', { a: entry({ shape: [-1, -2] }) }, 8, /shape/],
    ['minus zero', '{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', 0, /shape/],
    ['fraction', { a: entry({ shape: [0.5, 4] }) }, 8, /shape/],
    ['dim as text', { a: entry({ shape: ['2'] }) }, 8, /shape/],
    ['huge dim', '{"a":{"dtype":"F32","shape":[1e300],"data_offsets":[0,8]}}', 8, /shape/],
    ['huge product', { a: entry({ shape: [2 ** 31, 2 ** 31, 2 ** 31] }) }, 8, /shape/],
    [
      'product that wraps to 8 bytes',
      '{"a":{"dtype":"F32","shape":[4611686018427387906],"data_offsets":[0,8]}}',
      8,
      /shape/,
    ],
    ['huge offsets', { a: entry({ shape: [2 ** 50], data_offsets: [0, 2 ** 52] }) }, 8, /within the 8 bytes/],
    ['negative offset', { a: entry({ data_offsets: [-8, 0] }) }, 8, /data_offsets/],
    ['offsets the wrong way', { a: entry({ data_offsets: [8, 0] }) }, 8, /data_offsets/],
    ['one offset', { a: entry({ data_offsets: [8] }) }, 8, /data_offsets/],
    ['size of another shape', { a: entry({ shape: [1] }) }, 8, /4 bytes of its shape/],
    ['overlap', { a: entry(), b: entry({ data_offsets: [4, 12] }) }, 12, /"b".*overlaps/],
    ['same place', { a: entry(), b: entry() }, 8, /overlaps/],
    ['empty inside another', { a: entry(), b: entry({ shape: [0], data_offsets: [4, 4] }) }, 8, /"b".*overlaps/],
    ['hole', { a: entry(), b: entry({ data_offsets: [12, 20] }) }, 20, /"b".*hole of 4/],
    ['hole before the first', { a: entry({ data_offsets: [4, 12] }) }, 12, /hole of 4/],
    ['bytes after the last', { a: entry() }, 9, /file of/],
    ['metadata not text', { __metadata__: { a: 1 } }, 0, /__metadata__/],
    ['metadata not an object', { __metadata__: 'x' }, 0, /__metadata__/],
  ]
  it.each(cases)('%s', async (_, header, bytes, message) => {
    const found = await attempt(await forge(header, new Uint8Array(bytes)))
    expect(found).toBeInstanceOf(HstuError)
    expect((found as HstuError).message).toMatch(message)
  })

  it.each([0n, 1n, 3n, 1_000n, 100_000_001n, 2n ** 32n, 2n ** 53n, 2n ** 63n, 2n ** 64n - 1n])(
    'header length %s',
    async n => {
      expect(await attempt(await forge('{}', undefined, n))).toBeInstanceOf(HstuError)
    },
  )

  it('is a folder, a device, or not there', async () => {
    await expect(readSafetensors(folder)).rejects.toThrow(/found a folder/)
    await expect(readSafetensors('/dev/zero')).rejects.toThrow(/found a device/)
    await expect(readSafetensors(fresh())).rejects.toMatchObject({
      code: 'ERR_HSTU_CHECKPOINT',
      cause: { code: 'ENOENT' },
    })
  })

  it('is cut short anywhere', async () => {
    const path = fresh()
    await writeSafetensors(path, every, { a: 'b' })
    const file = await readFile(path)
    const cut = fresh()
    for (let length = 0; length < file.length; length += length < 40 || length > file.length - 160 ? 1 : 7) {
      await writeFile(cut, file.subarray(0, length))
      expect(await attempt(cut), `${length} bytes`).toBeInstanceOf(HstuError)
    }
    await writeFile(cut, Buffer.concat([file, Buffer.alloc(1)]))
    expect(await attempt(cut)).toBeInstanceOf(HstuError)
  })

  it('has bytes flipped: a typed error, or tensors that fill the file; with the hash always an error', async () => {
    const path = fresh()
    const { sha256 } = await writeSafetensors(path, every, { a: 'b' })
    const file = await readFile(path)
    const head = 8 + Number(file.readBigUInt64LE())
    let seed = 12345
    const random = (n: number) => (seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0) % n
    const flipped = fresh()
    const outcomes = { error: 0, read: 0 }
    for (let i = 0; i < 600; i++) {
      const copy = Buffer.from(file)
      // Every byte of the length, then the header at random: mostly what JSON is made of, to get past the parser.
      for (let k = 0; k <= i % 3; k++) {
        const at = i < 64 ? i >> 3 : 8 + random(head - 8)
        copy[at] =
          i < 64 ? copy[at]! ^ (1 << (i & 7)) : random(4) ? '0123456789[]{},":'.charCodeAt(random(17)) : random(256)
      }
      await writeFile(flipped, copy)
      const found = await attempt(flipped)
      outcomes[found instanceof HstuError ? 'error' : 'read']++
      if (!(found instanceof HstuError)) {
        let bytes = 0
        for (const { data } of found.tensors.values()) bytes += data.byteLength
        expect(bytes).toBe(file.length - head)
      }
      if (!copy.equals(file)) expect(await attempt(flipped, { sha256 })).toBeInstanceOf(HstuError)
    }
    expect(outcomes.error).toBeGreaterThan(300)
    expect(outcomes.read).toBeGreaterThan(10)
  })

  it('has another hash', async () => {
    const path = fresh()
    const { sha256 } = await writeSafetensors(path, every)
    const file = await readFile(path)
    file[file.length - 1]! ^= 1
    await writeFile(path, file)
    await expect(readSafetensors(path, { sha256 })).rejects.toThrow(new RegExp(`expected SHA-256 ${sha256}`))
  })
})
