import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { HstuError } from './errors.js'
import type { NativeOps } from './native-types.js'
import type { Tensor } from './tensor.js'

/** Element types of the addon; the CPU backend computes in float32 and float64. */
export type Dtype = 'float32' | 'float64' | 'bfloat16' | 'float16' | 'int32' | 'int64'

/** What tensors are written from and read into; Uint16Array holds the bits of bfloat16 and float16. */
export type TypedArray = Float32Array | Float64Array | Uint16Array | Int32Array | BigInt64Array

/** What there is to compute on. */
export interface Backend {
  threads: number
  instructionSet: string
  cuda: {
    /** Whether this addon holds CUDA kernels. */
    compiled: boolean
    usable: boolean
    /** Code of the error that an explicit 'cuda' throws. */
    code: string
    /** Why it is not usable; '' where it is. */
    reason: string
    /** Versions as CUDA counts them: 13000 is 13.0; 0 is none. */
    driver: number
    runtime: number
    devices: { name: string; computeCapability: string; multiprocessors: number; memory: number }[]
  }
}

/** What this process holds of a device's memory, and what the device has; in bytes. */
export interface DeviceMemory {
  /** Handed out now: tensors of all threads, and the scratch memory of running ops. */
  used: number
  /** The most that was used at once. */
  peak: number
  /** Used, and kept to be handed out again. */
  reserved: number
  /** Of the device, or of the host or its container. */
  free: number
  total: number
  /** What `setMemoryLimit` allows `reserved` to be; Infinity where it was not called. */
  limit: number
}

/** What the addon exports beside its ops: the storage layer of csrc/storage.cpp. */
interface NativeStorage {
  create(tensor: Tensor, dtype: Dtype, shape: readonly number[], device: string, zero: boolean): void
  create_view(tensor: Tensor, source: Tensor, shape: readonly number[], elementOffset: number): void
  dispose(tensor: Tensor): void
  is_disposed(tensor: Tensor): boolean
  write(tensor: Tensor, data: TypedArray): void
  read(tensor: Tensor, data: TypedArray): void
  /** Resolves with `data` when it holds the values that the tensor has at the call. */
  read_later<T extends TypedArray>(tensor: Tensor, data: T): Promise<T>
  memory(): { tensors: number; bytes: number }
  set_error_class(errorClass: typeof HstuError): void
  set_guards(on: boolean): void
  guard_violations(): number
  set_num_threads(count: number): void
  backend(): Backend
  memory_statistics(device: string): DeviceMemory
  set_memory_limit(device: string, bytes: number): void
  trim(device: string): void
  graph_create(graph: object, device: string, pool?: object): void
  graph_capture<R>(graph: object, fn: () => R, keep: boolean): R
  graph_launch(graph: object): void
  graph_dispose(graph: object): void
  ceilings(): { gflops: number; gbps: number }
  signatures: Record<string, string[]>
}

/** Whose history a chain of pages holds, and what else its rows depend on. */
export interface NativePageKey {
  model: string
  tenant: string
  user: string
  seed: ArrayBufferView
}

/** State and counts of a page manager; the comments of csrc/page_table.h say what each is. */
export type PageCounts = Record<
  | ('pages' | 'limit' | 'free' | 'cached' | 'held' | 'leases' | 'bytes' | 'acquiredTokens' | 'cachedTokens')
  | ('committed' | 'duplicates' | 'evicted' | 'expired' | 'forgotten' | 'exhausted'),
  number
>

/** The page manager of csrc/page_table.h: `manager` is wrapped with one. */
interface NativePages {
  pages_create(manager: object, options: Record<string, number | Uint8Array>): void
  pages_lookup(manager: object, key: NativePageKey, tokens: ArrayBufferView, now: number): number
  pages_acquire(
    manager: object,
    key: NativePageKey,
    tokens: ArrayBufferView,
    now: number,
    hashes: BigUint64Array | undefined,
  ): { lease: number; cached: number; pages: Int32Array }
  pages_append(manager: object, lease: number, tokens: ArrayBufferView, now: number): Int32Array
  pages_commit(manager: object, lease: number): number
  pages_release(manager: object, lease: number, now: number): void
  pages_forget(manager: object, tenant: string, user: string, now: number): { freed: number; held: number }
  pages_set_byte_limit(manager: object, bytes: number, now: number): void
  pages_statistics(manager: object, now: number): PageCounts
}

/** The vocabulary of csrc/vocabulary.cpp: `vocabulary` is wrapped with one. */
interface NativeVocabulary {
  /** @returns the first id that is there a second time; -1 */
  vocabulary_create(vocabulary: object, units: Uint16Array, ends: Int32Array): number
  /** Fills `numbers` with those of the texts from `first` on. */
  vocabulary_texts(vocabulary: object, units: Uint16Array, ends: Int32Array, first: number, numbers: Int32Array): void
  vocabulary_digits(vocabulary: object, ids: BigInt64Array, numbers: Int32Array): void
}

export type Native = NativeOps & NativeStorage & NativePages & NativeVocabulary

/** Folder of the package: the addon is under its `build/Release` (a local build) or `prebuilds/`. */
export const packageRoot = join(dirname(fileURLToPath(import.meta.url)), '..')

function load(): Native {
  const require = createRequire(import.meta.url)
  try {
    const addon = require('node-gyp-build')(packageRoot) as Native
    addon.set_error_class(HstuError)
    return addon
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause)
    const glibc = (process.report?.getReport() as { header?: { glibcVersionRuntime?: string } } | undefined)?.header
      ?.glibcVersionRuntime
    const error = new HstuError(
      'ERR_HSTU_NATIVE_LOAD',
      `The native addon of hstu could not be loaded.\n  ${reason.split('\n').join('\n  ')}\n` +
        `  looked in: ${join(packageRoot, 'build/Release')}, ${join(packageRoot, 'prebuilds')}\n` +
        `  this host: ${process.platform}-${process.arch}, Node ${process.version}, glibc ${glibc ?? 'not found'}\n` +
        'What helps:\n' +
        '  - prebuilt binaries are for linux-x64 with glibc 2.34 or later (Ubuntu 22.04, Debian 12, RHEL 9)\n' +
        '  - in a clone of the repository: npm ci && npm run build:all (GCC 12 and CMake 3.18, or later, are needed)',
      { cause },
    )
    // Importing the package works on any host; the first use of the addon says what is wrong.
    return new Proxy({} as Native, {
      get() {
        throw error
      },
    })
  }
}

/** The addon, loaded once per thread. */
export const native: Native = load()
