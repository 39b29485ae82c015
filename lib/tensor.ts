/// <reference lib="esnext.disposable" preserve="true" />
import { check, HstuError } from './errors.js'
import { type DeviceMemory, type Dtype, native, type TypedArray } from './native.js'

export type { DeviceMemory, Dtype, TypedArray } from './native.js'

/** Where a tensor lives; 'cuda' is the first CUDA device. */
export type Device = 'cpu' | 'cuda' | `cuda:${number}`

const indexed = (device: Device) => (device === 'cuda' ? 'cuda:0' : device)

const arrayOf = {
  float32: Float32Array,
  float64: Float64Array,
  bfloat16: Uint16Array,
  float16: Uint16Array,
  int32: Int32Array,
  int64: BigInt64Array,
} as const

export const dtypeBytes: Record<Dtype, number> = { float32: 4, float64: 8, bfloat16: 2, float16: 2, int32: 4, int64: 8 }

export interface TensorOptions {
  /** Default float32. */
  dtype?: Dtype
  /** Default 'cpu'. */
  device?: Device
}

function dtypeOf(data: TypedArray): Dtype {
  if (data instanceof Float32Array) return 'float32'
  if (data instanceof Float64Array) return 'float64'
  if (data instanceof Int32Array) return 'int32'
  if (data instanceof BigInt64Array) return 'int64'
  throw new HstuError('ERR_HSTU_DTYPE', `Tensor.from: cannot infer a dtype from ${data.constructor.name}; name it`)
}

/** Tensors made since the innermost open scope began; null outside every scope. */
let currentScope: Tensor[] | null = null
/** While a tape records, disposing waits until it is done with the tensor (autograd.ts sets this). */
let deferDispose: ((tensor: Tensor) => void) | null = null

/**
 * A dense row-major array that the addon owns. Ops make new tensors; `dispose()` (or a `scope`) frees them, the garbage
 * collector only as a net. Use after dispose throws `ERR_HSTU_DISPOSED`.
 */
export class Tensor {
  readonly dtype: Dtype
  readonly shape: readonly number[]
  readonly device: Device
  readonly size: number

  private constructor(dtype: Dtype, shape: readonly number[], device: Device) {
    this.dtype = dtype
    // The addon keeps its own copy: a shape that changes later would disagree with it.
    this.shape = Object.isFrozen(shape) ? shape : Object.freeze([...shape])
    this.device = indexed(device)
    let size = 1
    for (const dim of this.shape) size *= dim
    this.size = size
  }

  private static register(tensor: Tensor): Tensor {
    Object.freeze(tensor)
    currentScope?.push(tensor)
    return tensor
  }

  private static create(shape: readonly number[], options: TensorOptions, zero: boolean): Tensor {
    const tensor = new Tensor(options.dtype ?? 'float32', shape, options.device ?? 'cpu')
    native.create(tensor, tensor.dtype, tensor.shape, tensor.device, zero)
    return Tensor.register(tensor)
  }

  /** Uninitialised memory; every op that takes it as an output writes all of it. */
  static empty(shape: readonly number[], options: TensorOptions = {}): Tensor {
    return Tensor.create(shape, options, false)
  }

  static zeros(shape: readonly number[], options: TensorOptions = {}): Tensor {
    return Tensor.create(shape, options, true)
  }

  /**
   * Copies `data` into a new tensor. A typed array gives its own dtype (float32, float64, int32, int64) unless `dtype` names
   * another; a plain array of numbers gives float32. `shape` defaults to `[data.length]`.
   * @throws HstuError ERR_HSTU_SHAPE when the lengths disagree, ERR_HSTU_DTYPE for a dtype that `data` cannot hold.
   */
  static from(data: TypedArray | readonly number[], shape?: readonly number[], options: TensorOptions = {}): Tensor {
    const dtype = options.dtype ?? (ArrayBuffer.isView(data) ? dtypeOf(data) : 'float32')
    const dims = shape ?? [data.length]
    const Ctor = arrayOf[dtype]
    let typed: TypedArray
    if (ArrayBuffer.isView(data) && data instanceof Ctor) typed = data
    else if (dtype === 'int64') typed = BigInt64Array.from(Array.from(data as readonly number[], x => BigInt(x)))
    else if (dtype === 'bfloat16' || dtype === 'float16')
      throw new HstuError('ERR_HSTU_DTYPE', `Tensor.from: ${dtype} data must be a Uint16Array of its bits; or cast()`)
    else typed = new (Ctor as Float64ArrayConstructor)(Array.from(data as readonly number[], Number)) as TypedArray
    const size = dims.reduce((a, b) => a * b, 1)
    check(size === typed.length, 'ERR_HSTU_SHAPE', () => {
      return `Tensor.from: ${typed.length} values do not fill shape [${dims.join(', ')}]`
    })
    const tensor = Tensor.empty(dims, { dtype, ...(options.device ? { device: options.device } : {}) })
    native.write(tensor, typed)
    return tensor
  }

  get rank(): number {
    return this.shape.length
  }

  get disposed(): boolean {
    return native.is_disposed(this)
  }

  /** Same storage, other shape of the same size. Not recorded for gradients: `reshape` of the package is. */
  view(shape: readonly number[], elementOffset = 0): Tensor {
    const tensor = new Tensor(this.dtype, shape, this.device)
    native.create_view(tensor, this, tensor.shape, elementOffset)
    return Tensor.register(tensor)
  }

  /** A view of rows `begin` to `end` (exclusive) of the first dim. */
  rows(begin: number, end: number): Tensor {
    const [first = 0, ...rest] = this.shape
    check(begin >= 0 && begin <= end && end <= first, 'ERR_HSTU_SHAPE', () => {
      return `rows(${begin}, ${end}) of a tensor of shape [${this.shape.join(', ')}]`
    })
    return this.view([end - begin, ...rest], begin * rest.reduce((a, b) => a * b, 1))
  }

  /** Overwrites all values in place. */
  write(data: TypedArray): void {
    check(data instanceof arrayOf[this.dtype], 'ERR_HSTU_DTYPE', () => {
      return `write: ${data.constructor.name} into a ${this.dtype} tensor`
    })
    native.write(this, data)
  }

  /** A copy of the values, read at once. */
  dataSync(): TypedArray {
    const data = new arrayOf[this.dtype](this.size)
    native.read(this, data)
    return data
  }

  /**
   * A copy of the values as they are at the call, whatever is written or disposed after it. On CUDA it does not block the event loop;
   * on the CPU the values are there already. The process stays alive until the promise is settled.
   */
  async data(): Promise<TypedArray> {
    if (this.device === 'cpu') return this.dataSync()
    return native.read_later(this, new arrayOf[this.dtype](this.size))
  }

  /** The only value of a one-element tensor. */
  item(): number {
    check(this.size === 1, 'ERR_HSTU_SHAPE', () => `item() of a tensor of shape [${this.shape.join(', ')}]`)
    return Number(this.dataSync()[0])
  }

  /** Frees the memory (once its last view is gone). May be called again. Inside `valueAndGrad` it takes effect at its end. */
  dispose(): void {
    if (deferDispose) deferDispose(this)
    else native.dispose(this)
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}

function collect(value: unknown, kept: Set<Tensor>): void {
  if (value instanceof Tensor) kept.add(value)
  else if (Array.isArray(value) || value instanceof Set) for (const item of value) collect(item, kept)
  else if (value instanceof Map) for (const item of value.values()) collect(item, kept)
  else if (value && typeof value === 'object' && Object.getPrototypeOf(value) === Object.prototype)
    for (const item of Object.values(value)) collect(item, kept)
}

/** The tensors in a result, as `scope` finds them: in arrays, sets, maps and plain objects, in order. */
export function tensorsIn(value: unknown): Tensor[] {
  const found = new Set<Tensor>()
  collect(value, found)
  return [...found]
}

/** `scope`, telling also which of the tensors in the result were made inside. */
export function keptBy<R>(fn: () => R): { result: R; kept: Tensor[] } {
  const outer = currentScope
  const made: Tensor[] = (currentScope = [])
  const inResult = new Set<Tensor>()
  try {
    const result = fn()
    if (result instanceof Promise)
      throw new HstuError('ERR_HSTU_INVALID_ARGUMENT', 'scope: the function returned a promise; a scope is synchronous')
    collect(result, inResult)
    return { result, kept: made.filter(tensor => inResult.has(tensor)) }
  } finally {
    currentScope = outer
    for (const tensor of made)
      if (inResult.has(tensor)) outer?.push(tensor)
      else tensor.dispose()
  }
}

/**
 * Runs `fn` and frees every tensor made inside, except those in its return value (a tensor, or arrays, maps and plain objects of
 * them), which pass to the enclosing scope if there is one.
 * @throws HstuError ERR_HSTU_INVALID_ARGUMENT when `fn` returns a promise: a scope is synchronous.
 */
export function scope<R>(fn: () => R): R {
  return keptBy(fn).result
}

/** Runs `fn` outside every scope: what it makes lives until it is disposed. For parameters and optimiser state. */
export function unscoped<R>(fn: () => R): R {
  const outer = currentScope
  currentScope = null
  try {
    return fn()
  } finally {
    currentScope = outer
  }
}

/** Sets what happens to `dispose()` while a tape records; returns the setting before. For autograd.ts. */
export function setDisposeHandler(handler: ((tensor: Tensor) => void) | null): typeof deferDispose {
  const before = deferDispose
  deferDispose = handler
  return before
}

export function emptyLike(tensor: Tensor): Tensor {
  return Tensor.empty(tensor.shape, tensor)
}

/**
 * Without a device: the live tensors of this thread, on all devices, and the bytes of their storages. With one: what the process
 * holds of that device's memory.
 * @throws HstuError ERR_HSTU_CUDA_UNAVAILABLE, ERR_HSTU_DRIVER_TOO_OLD where `device` is unavailable.
 */
export function memory(): { tensors: number; bytes: number }
export function memory(device: Device): DeviceMemory
export function memory(device?: Device): { tensors: number; bytes: number } | DeviceMemory {
  return device === undefined ? native.memory() : native.memory_statistics(indexed(device))
}

/**
 * The most that this process, with all its threads, may hold of a device's memory; `Infinity` (as at the start) lifts the limit. An
 * allocation that does not fit gives back what is kept unused and tries once more; then it throws ERR_HSTU_OUT_OF_MEMORY with the
 * bytes that were requested, are free, and are the limit. What is held already stays, also where it is more.
 * @param bytes 0 or more
 * @throws HstuError ERR_HSTU_INVALID_ARGUMENT; ERR_HSTU_CUDA_UNAVAILABLE, ERR_HSTU_DRIVER_TOO_OLD where `device` is unavailable.
 */
export function setMemoryLimit(bytes: number, device: Device = 'cpu'): void {
  native.set_memory_limit(indexed(device), bytes)
}

/** How shapes read in messages. */
export function shapeText(tensor: Tensor): string {
  return `${tensor.dtype}[${tensor.shape.join(', ')}]`
}
