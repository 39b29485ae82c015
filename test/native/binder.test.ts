import { HstuError } from '#lib/errors.js'
import { native } from '#lib/native.js'
import { memory, scope, Tensor } from '#lib/tensor.js'

type Loose = (...args: unknown[]) => unknown
const ops = native as unknown as Record<string, Loose>

const codeOf = (fn: () => unknown): string => {
  try {
    scope(fn)
  } catch (error) {
    expect(error).toBeInstanceOf(HstuError)
    return `${(error as HstuError).code} ${(error as HstuError).message}`
  }
  return 'nothing was thrown'
}

let before: { tensors: number; bytes: number }
beforeEach(() => {
  before = memory()
})
afterEach(() => {
  expect(memory()).toEqual(before)
})

describe('binder', () => {
  it('counts the arguments', () => {
    const x = () => Tensor.zeros([2])
    expect(codeOf(() => ops.add!(x(), x()))).toBe('ERR_HSTU_INVALID_ARGUMENT add: expected 3 arguments, got 2')
    expect(codeOf(() => ops.add!(x(), x(), x(), x()))).toBe(
      'ERR_HSTU_INVALID_ARGUMENT add: expected 3 arguments, got 4',
    )
    expect(codeOf(() => ops.add!())).toBe('ERR_HSTU_INVALID_ARGUMENT add: expected 3 arguments, got 0')
  })

  it.each([
    ['an empty object', {}],
    ['an object of the same prototype', Object.create(Tensor.prototype)],
    ['null', null],
    ['undefined', undefined],
    ['a number', 3],
    ['a typed array', new Float32Array(2)],
    ['a function', () => {}],
    ['another wrapped object', new Proxy(Object.create(Tensor.prototype), {})],
  ])('refuses %s as a tensor, in every place', (_, value) => {
    for (const [i, name] of ['y', 'a', 'b'].entries()) {
      const message = codeOf(() => {
        const args: unknown[] = [Tensor.zeros([2]), Tensor.zeros([2]), Tensor.zeros([2])]
        args[i] = value
        return ops.add!(...args)
      })
      expect(message).toBe(`ERR_HSTU_INVALID_ARGUMENT add: ${name} must be a Tensor`)
    }
  })

  it('sees through a proxy to no handle', () => {
    const refused = codeOf(() => ops.add!(Tensor.zeros([2]), new Proxy(Tensor.zeros([2]), {}), Tensor.zeros([2])))
    expect(refused).toBe('ERR_HSTU_INVALID_ARGUMENT add: a must be a Tensor')
  })

  it('refuses a disposed tensor and one whose scope has ended', () => {
    const disposed = Tensor.zeros([2])
    disposed.dispose()
    disposed.dispose()
    let escaped: Tensor | undefined
    scope(() => void (escaped = Tensor.zeros([2])))
    for (const gone of [disposed, escaped!]) {
      expect(gone.disposed).toBe(true)
      expect(codeOf(() => ops.add!(Tensor.zeros([2]), gone, Tensor.zeros([2])))).toBe(
        'ERR_HSTU_DISPOSED add: a is disposed',
      )
      expect(codeOf(() => gone.dataSync())).toMatch(/^ERR_HSTU_DISPOSED/)
      expect(codeOf(() => gone.write(new Float32Array(2)))).toMatch(/^ERR_HSTU_DISPOSED/)
      expect(codeOf(() => gone.view([2]))).toMatch(/^ERR_HSTU_DISPOSED/)
    }
  })

  it('refuses strings that an enum does not have', () => {
    const call = (activation: unknown) =>
      codeOf(() => {
        const [y, x, w] = [Tensor.zeros([2, 2]), Tensor.zeros([2, 2]), Tensor.zeros([2, 2])]
        return ops.linear!(y, null, x, w, null, null, activation)
      })
    const wanted = "linear: activation must be one of 'none' | 'silu' | 'relu' | 'gelu', got"
    expect(call('swish')).toBe(`ERR_HSTU_INVALID_ARGUMENT ${wanted} 'swish'`)
    expect(call('')).toBe(`ERR_HSTU_INVALID_ARGUMENT ${wanted} ''`)
    expect(call('none\0')).toMatch(/^ERR_HSTU_INVALID_ARGUMENT/)
    expect(call('x'.repeat(100_000))).toMatch(/^ERR_HSTU_INVALID_ARGUMENT/)
    for (const value of [1, null, undefined, {}, Symbol('none')])
      expect(call(value)).toMatch(/^ERR_HSTU_INVALID_ARGUMENT/)
  })

  it('survives arguments that throw when they are read', () => {
    const hostile = new Proxy(
      {},
      {
        get() {
          throw new Error('hostile')
        },
        getPrototypeOf() {
          throw new Error('hostile')
        },
      },
    )
    expect(codeOf(() => ops.add!(Tensor.zeros([2]), hostile, Tensor.zeros([2])))).toMatch(/^ERR_HSTU_INVALID_ARGUMENT/)
  })
})

/** The first op whose signature has a parameter of this kind, called with `value` in its place and tensors elsewhere. */
function callWith(kind: string, value: unknown): string {
  const [op, parameters] = Object.entries(native.signatures).find(([, list]) =>
    list.some(p => p.endsWith(`: ${kind}`)),
  )!
  const at = parameters.findIndex(parameter => parameter.endsWith(`: ${kind}`))
  const sample = (parameter: string): unknown => {
    const type = parameter.slice(parameter.indexOf(': ') + 2)
    if (type === 'Tensor') return Tensor.zeros([1])
    if (type === 'readonly Tensor[]') return []
    if (type === 'number') return 0
    if (type === 'bigint') return 0n
    if (type === 'boolean') return false
    if (type.startsWith("'")) return type.slice(1, type.indexOf("'", 1))
    return null
  }
  const name = parameters[at]!.split(':')[0]
  return codeOf(() => ops[op]!(...parameters.map((p, i) => (i === at ? value : sample(p))))).replace(
    `${op}: ${name}`,
    'op: x',
  )
}

const has = (kind: string) => Object.values(native.signatures).some(list => list.some(p => p.endsWith(`: ${kind}`)))

describe('scalars', () => {
  it.skipIf(!has('number'))('refuses what is no number', () => {
    for (const value of ['1', 1n, null, undefined, {}, true, Symbol('1')])
      expect(callWith('number', value)).toBe('ERR_HSTU_INVALID_ARGUMENT op: x must be a number')
  })

  it.skipIf(!has('bigint'))('refuses what is no 64-bit bigint', () => {
    for (const value of [1, '1', null, undefined, 2n ** 63n, -(2n ** 63n) - 1n, 2n ** 200n])
      expect(callWith('bigint', value)).toBe('ERR_HSTU_INVALID_ARGUMENT op: x must be a bigint of 64 bits')
  })

  it.skipIf(!has('boolean'))('refuses what is no boolean', () => {
    for (const value of [1, 'true', null, undefined])
      expect(callWith('boolean', value)).toBe('ERR_HSTU_INVALID_ARGUMENT op: x must be a boolean')
  })

  it.skipIf(!has('readonly Tensor[]'))('refuses what is no list of tensors', () => {
    for (const value of [1, null, {}, { length: 1 }])
      expect(callWith('readonly Tensor[]', value)).toBe('ERR_HSTU_INVALID_ARGUMENT op: x must be an array of Tensors')
    expect(callWith('readonly Tensor[]', [{}])).toBe('ERR_HSTU_INVALID_ARGUMENT op: x[0] must be a Tensor')
  })

  // An int parameter: fractions and what does not fit 32 bits.
  it.skipIf(!('hstu_attention' in native.signatures))('refuses numbers that are no 32-bit integer', () => {
    const parameters = native.signatures.hstu_attention!
    const at = parameters.indexOf('max_attn_len: number')
    for (const value of [0.5, 2 ** 31, -(2 ** 31) - 1, 1e300, Number.NaN, Number.POSITIVE_INFINITY]) {
      const args = parameters.map((parameter, i) => {
        if (i === at) return value
        if (parameter.endsWith(': Tensor')) return Tensor.zeros([1])
        if (parameter.endsWith(': bigint')) return 0n
        return parameter.endsWith(': number') ? 0 : null
      })
      const message = codeOf(() => ops.hstu_attention!(...args))
      for (const arg of args) if (arg instanceof Tensor) arg.dispose()
      expect(message).toMatch(/^ERR_HSTU_INVALID_ARGUMENT hstu_attention: max_attn_len must be a 32-bit integer/)
    }
  })
})

describe('storage', () => {
  it.each([
    ['a negative dim', [-1], 'ERR_HSTU_SHAPE'],
    ['a fraction', [1.5], 'ERR_HSTU_SHAPE'],
    ['NaN', [Number.NaN], 'ERR_HSTU_SHAPE'],
    ['infinity', [Number.POSITIVE_INFINITY], 'ERR_HSTU_SHAPE'],
    ['a product beyond 2^53', [2 ** 30, 2 ** 30], 'ERR_HSTU_SHAPE'],
    ['a product beyond 2^63', [2 ** 40, 2 ** 40], 'ERR_HSTU_SHAPE'],
    ['six dims', [1, 1, 1, 1, 1, 1], 'ERR_HSTU_SHAPE'],
    ['more memory than any host has', [2 ** 50], 'ERR_HSTU_OUT_OF_MEMORY'],
    ['a dim that is a string', ['2'] as unknown as number[], 'ERR_HSTU_INVALID_ARGUMENT'],
    ['a string', '12' as unknown as number[], 'ERR_HSTU_INVALID_ARGUMENT'],
  ])('refuses the shape %s', (_, shape, code) => {
    expect(codeOf(() => Tensor.empty(shape)).split(' ')[0]).toBe(code)
  })

  it('refuses devices and dtypes that are not there', () => {
    expect(codeOf(() => Tensor.zeros([1], { device: 'cuda:99' }))).toMatch(/^ERR_HSTU_CUDA_UNAVAILABLE/)
    expect(codeOf(() => Tensor.zeros([1], { device: 'tpu' as 'cpu' }))).toMatch(/^ERR_HSTU_/)
    expect(codeOf(() => Tensor.zeros([1], { dtype: 'int8' as 'int32' }))).toMatch(/^ERR_HSTU_DTYPE/)
  })

  it('refuses to make a tensor of a tensor, or of what is no object', () => {
    const x = Tensor.zeros([2])
    const create = native.create as unknown as Loose
    expect(codeOf(() => create(x, 'float32', [2], 'cpu', true))).toMatch(/^ERR_HSTU_INVALID_ARGUMENT/)
    expect(codeOf(() => create(3, 'float32', [2], 'cpu', true))).toMatch(/^ERR_HSTU_INVALID_ARGUMENT/)
    x.dispose()
  })

  it('refuses arrays of another size, detached or of no type', () => {
    const x = Tensor.zeros([4])
    const write = native.write as unknown as Loose
    const detached = new Float32Array(4)
    structuredClone(detached.buffer, { transfer: [detached.buffer] })
    expect(codeOf(() => x.write(detached))).toMatch(/^ERR_HSTU_SHAPE/)
    expect(codeOf(() => native.read(x, detached))).toMatch(/^ERR_HSTU_SHAPE/)
    expect(codeOf(() => x.write(new Float32Array(3)))).toMatch(/^ERR_HSTU_SHAPE/)
    expect(codeOf(() => x.write(new Float64Array(4) as never))).toMatch(/^ERR_HSTU_DTYPE/)
    for (const value of [[1, 2, 3, 4], new ArrayBuffer(16), new DataView(new ArrayBuffer(16)), null, 'four'])
      expect(codeOf(() => write(x, value))).toMatch(/^ERR_HSTU_INVALID_ARGUMENT/)
    x.dispose()
  })

  it('reads and writes at the offset of a typed array, and through shared memory', () => {
    const x = Tensor.zeros([2])
    x.write(Float32Array.of(1, 2, 3, 4).subarray(1, 3))
    expect([...x.dataSync()]).toEqual([2, 3])
    const shared = new Float32Array(new SharedArrayBuffer(8))
    native.read(x, shared)
    expect([...shared]).toEqual([2, 3])
    x.dispose()
  })

  it('keeps views inside their source, and its memory while a view lives', () => {
    const x = Tensor.from([1, 2, 3, 4])
    expect(codeOf(() => x.view([5]))).toMatch(/^ERR_HSTU_SHAPE/)
    expect(codeOf(() => x.view([2], 3))).toMatch(/^ERR_HSTU_SHAPE/)
    expect(codeOf(() => x.view([2], -1))).toMatch(/^ERR_HSTU_SHAPE/)
    expect(codeOf(() => x.view([2], Number.NaN))).toMatch(/^ERR_HSTU_SHAPE/)
    expect(codeOf(() => x.view([1], 0.5))).toMatch(/^ERR_HSTU_SHAPE/)
    const view = x.view([2], 2)
    x.dispose()
    expect([...view.dataSync()]).toEqual([3, 4])
    expect(memory()).toEqual({ tensors: before.tensors + 1, bytes: before.bytes + 16 })
    view.dispose()
  })
})
