/** Every error code that this package throws. Codes are stable; messages may be improved. */
export type HstuErrorCode =
  | 'ERR_HSTU_SHAPE'
  | 'ERR_HSTU_DTYPE'
  | 'ERR_HSTU_DISPOSED'
  | 'ERR_HSTU_DEVICE'
  | 'ERR_HSTU_CUDA_UNAVAILABLE'
  | 'ERR_HSTU_DRIVER_TOO_OLD'
  | 'ERR_HSTU_OUT_OF_MEMORY'
  | 'ERR_HSTU_DEVICE_LOST'
  | 'ERR_HSTU_INVALID_ARGUMENT'
  | 'ERR_HSTU_CHECKPOINT'
  | 'ERR_HSTU_DATA'
  | 'ERR_HSTU_ABORTED'
  | 'ERR_HSTU_OVERLOADED'
  | 'ERR_HSTU_NATIVE_LOAD'

/** The one error type of the package: `code` tells what kind, `message` names what was wrong and where. */
export class HstuError extends Error {
  override readonly name = 'HstuError'
  /** Of ERR_HSTU_OVERLOADED: when the same request may be taken. */
  readonly retryAfterMs: number | null

  constructor(
    readonly code: HstuErrorCode,
    message: string,
    options: ErrorOptions & { retryAfterMs?: number } = {},
  ) {
    super(message, options)
    this.retryAfterMs = options.retryAfterMs ?? null
  }
}

/** Throws `HstuError(code, message())` unless `condition` holds; the message is only built when needed. */
export function check(condition: unknown, code: HstuErrorCode, message: () => string): asserts condition {
  if (!condition) throw new HstuError(code, message())
}
