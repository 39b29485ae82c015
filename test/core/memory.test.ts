import { describe, expect, it } from 'vitest'
import { native } from '#lib/native.js'
import { add } from '#lib/ops/add.js'
import { type Device, memory, scope, setMemoryLimit, Tensor } from '#lib/tensor.js'

const MiB = 2 ** 20
const { usable, reason } = native.backend().cuda

const outOfMemory = (message: RegExp) =>
  expect.objectContaining({ code: 'ERR_HSTU_OUT_OF_MEMORY', message: expect.stringMatching(message) })

/** Runs `fn` with room for `bytes` beyond what is used now. */
function limited(device: Device, bytes: number, fn: () => void): void {
  native.trim(device)
  setMemoryLimit(memory(device).used + bytes, device)
  try {
    scope(fn)
  } finally {
    setMemoryLimit(Number.POSITIVE_INFINITY, device)
  }
}

describe.each(['cpu', 'cuda:0'] as const)('memory of %s', device => {
  const row =
    device === 'cpu' || usable ? it : (name: string, fn: () => void) => it.skip(`${name}: NOT RUN (${reason})`, fn)
  const floats = (bytes: number) => Tensor.empty([bytes / 4], { device })

  row('counts what is used, was used at most, and is kept', () => {
    const before = memory(device)
    const tensor = floats(4 * MiB)
    const during = memory(device)
    expect(during.used).toBe(before.used + 4 * MiB)
    expect(during.peak).toBeGreaterThanOrEqual(during.used)
    expect(during.reserved).toBeGreaterThanOrEqual(during.used)
    expect(during.total).toBeGreaterThan(during.free)
    expect(during.free).toBeGreaterThan(0)
    expect(during.limit).toBe(Number.POSITIVE_INFINITY)
    tensor.dispose()
    const after = memory(device)
    expect(after.used).toBe(before.used)
    expect(after.peak).toBe(during.peak)
  })

  row('keeps freed blocks until it is trimmed', () => {
    native.trim(device)
    const before = memory(device).reserved
    floats(64 * MiB).dispose()
    expect(memory(device).reserved).toBeGreaterThanOrEqual(before + 64 * MiB)
    native.trim(device)
    expect(memory(device).reserved).toBe(before)
  })

  row('refuses what does not fit the limit, and says what was requested and free', () => {
    limited(device, 8 * MiB, () => {
      const limit = memory(device).limit
      const wanted = new RegExp(
        `^float32\\[2097152\\] of 8388608 bytes: out of memory on ${device}: 8388608 bytes requested, 6291456 free of the limit of ${limit} `,
      )
      floats(2 * MiB)
      expect(() => floats(8 * MiB)).toThrow(outOfMemory(wanted))
      floats(6 * MiB)
      expect(() => floats(4)).toThrow(outOfMemory(/ 4 bytes requested, 0 free of the limit/))
    })
  })

  row('gives back what is kept before it refuses', () => {
    limited(device, 8 * MiB, () => {
      floats(7 * MiB).dispose() // kept: a block of 8 MiB is made in its place
      floats(8 * MiB)
    })
  })

  row('refuses the output of an op, and goes on when there is room again', () => {
    scope(() => {
      const x = Tensor.zeros([MiB / 4], { device })
      limited(device, MiB / 2, () => expect(() => add(x, x)).toThrow(outOfMemory(/float32\[262144\].* 524288 free/)))
      expect(add(x, x).size).toBe(MiB / 4)
    })
  })

  row('keeps what is held when the limit is set below it', () => {
    const x = Tensor.from([1, 2], [2], { device })
    limited(device, -1, () => {
      expect([...x.dataSync()]).toEqual([1, 2])
      expect(() => floats(MiB)).toThrow(outOfMemory(/, 0 free of the limit/))
    })
    x.dispose()
  })
})

it('refuses limits that are no number of bytes, and devices that are not there', () => {
  for (const bytes of [-1, Number.NaN])
    expect(() => setMemoryLimit(bytes)).toThrow(expect.objectContaining({ code: 'ERR_HSTU_INVALID_ARGUMENT' }))
  for (const fn of [() => memory('cuda:99'), () => setMemoryLimit(1, 'cuda:99')])
    expect(fn).toThrow(expect.objectContaining({ code: expect.stringMatching(/^ERR_HSTU_(CUDA_UNAVAILABLE|DRIVER)/) }))
})
