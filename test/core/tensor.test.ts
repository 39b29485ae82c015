import { describe, expect, it } from 'vitest'
import { memory, scope, Tensor, unscoped } from '#lib/tensor.js'

describe('Tensor', () => {
  it('round-trips every dtype', () => {
    const rows = [
      Float32Array.of(1.5, -2),
      Float64Array.of(1e-300, 3),
      Int32Array.of(-7, 8),
      BigInt64Array.of(2n ** 62n, -1n),
    ]
    for (const data of rows) {
      using tensor = Tensor.from(data)
      expect(tensor.shape).toEqual([2])
      expect(tensor.dataSync()).toEqual(data)
    }
    using half = Tensor.from(Uint16Array.of(0x3f80), [1], { dtype: 'bfloat16' })
    expect(half.dataSync()).toEqual(Uint16Array.of(0x3f80))
  })

  it('takes plain arrays and ids beyond 2^53', () => {
    using floats = Tensor.from([1, 2, 3, 4], [2, 2])
    expect(floats.dtype).toBe('float32')
    using ids = Tensor.from(BigInt64Array.of(9007199254740993n))
    expect(ids.dataSync()[0]).toBe(9007199254740993n)
  })

  it('reads a subarray of a larger buffer', () => {
    const data = Float32Array.from({ length: 10 }, (_, i) => i)
    using tensor = Tensor.from(data.subarray(3, 6))
    expect([...(tensor.dataSync() as Float32Array)]).toEqual([3, 4, 5])
  })

  it('names what was wrong', () => {
    const failing = (fn: () => unknown, code: string, message: RegExp) => {
      expect(fn).toThrow(expect.objectContaining({ code, message: expect.stringMatching(message), name: 'HstuError' }))
    }
    failing(() => Tensor.from([1, 2, 3], [2, 2]), 'ERR_HSTU_SHAPE', /3 values do not fill shape \[2, 2\]/)
    failing(() => Tensor.empty([-1]), 'ERR_HSTU_SHAPE', /dim 0 must be a non-negative integer, got -1/)
    failing(() => Tensor.empty([2 ** 31, 2 ** 31]), 'ERR_HSTU_SHAPE', /shape \[2147483648, 2147483648\] is too large/)
    failing(
      () => Tensor.empty([2 ** 45]),
      'ERR_HSTU_OUT_OF_MEMORY',
      /float32\[35184372088832\] of 140737488355328 bytes: out of memory on cpu: 140737488355328 bytes requested, \d+ free of \d+/,
    )
    failing(() => Tensor.empty([1, 1, 1, 1, 1, 1]), 'ERR_HSTU_SHAPE', /at most 5 dims/)
    failing(() => Tensor.empty([1], { dtype: 'float8' as never }), 'ERR_HSTU_DTYPE', /float8/)
    using tensor = Tensor.zeros([3])
    failing(() => tensor.write(new Float64Array(3)), 'ERR_HSTU_DTYPE', /Float64Array into a float32/)
    failing(() => tensor.write(new Float32Array(2)), 'ERR_HSTU_SHAPE', /8 bytes .* 12/)
    failing(() => tensor.item(), 'ERR_HSTU_SHAPE', /item\(\)/)
    failing(() => tensor.rows(1, 4), 'ERR_HSTU_SHAPE', /rows\(1, 4\)/)
  })

  it('shares storage among views and frees it with the last one', () => {
    const before = memory()
    const tensor = Tensor.from([1, 2, 3, 4, 5, 6], [3, 2])
    const row = tensor.rows(1, 2)
    tensor.dispose()
    expect([...(row.dataSync() as Float32Array)]).toEqual([3, 4])
    expect(memory().bytes).toBe(before.bytes + 24)
    row.dispose()
    row.dispose()
    expect(memory()).toEqual(before)
    expect(row.disposed).toBe(true)
    expect(() => row.dataSync()).toThrow(expect.objectContaining({ code: 'ERR_HSTU_DISPOSED' }))
  })
})

describe('scope', () => {
  it('frees all but what is returned, in arrays, maps and objects too', () => {
    const before = memory().tensors
    const kept = scope(() => {
      Tensor.zeros([4])
      return { a: [Tensor.zeros([1])], b: new Map([['x', Tensor.zeros([1])]]), n: 1 }
    })
    expect(memory().tensors).toBe(before + 2)
    kept.a[0]!.dispose()
    kept.b.get('x')!.dispose()
    expect(memory().tensors).toBe(before)
  })

  it('hands what an inner scope returns to the outer one', () => {
    const before = memory().tensors
    scope(() => {
      const inner = scope(() => Tensor.zeros([1]))
      expect(inner.disposed).toBe(false)
    })
    expect(memory().tensors).toBe(before)
  })

  it('frees when the function throws, and leaves unscoped tensors alone', () => {
    const before = memory().tensors
    let kept: Tensor | undefined
    expect(() =>
      scope(() => {
        Tensor.zeros([1])
        kept = unscoped(() => Tensor.zeros([1]))
        throw new Error('stop')
      }),
    ).toThrow('stop')
    expect(memory().tensors).toBe(before + 1)
    kept!.dispose()
  })

  it('refuses a promise', () => {
    expect(() => scope(async () => 1)).toThrow(expect.objectContaining({ code: 'ERR_HSTU_INVALID_ARGUMENT' }))
  })
})
