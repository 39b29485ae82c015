import { native } from '#lib/native.js'
import { cast } from '#lib/ops/cast.js'
import { embedding } from '#lib/ops/embedding.js'
import { linear } from '#lib/ops/linear.js'
import { randomIds } from '#lib/ops/random_ids.js'
import { Random } from '#lib/random.js'
import { type Device, scope, Tensor } from '#lib/tensor.js'
import { normal, placed } from '../test/values.js'
import { capture } from './calls.js'
import { type FloatDtype, round } from './harness.js'
import { type PeerRow, publishedPeers } from './peers.js'
import { secondsOf } from './timing.js'

/** What the device can do, measured in the run that it belongs to (but for `tensorCores`, where `tensorCoresBy` says otherwise). */
export interface Ceiling {
  /** GB/s of a copy, read plus written. */
  gbps: number
  /** GFLOP/s of the largest product of our own, by dtype; on the CPU of FMAs that stay in registers. */
  product: Partial<Record<FloatDtype, number>>
  /** GFLOP/s of bfloat16 tensor cores: cuBLAS on 8192^3. */
  tensorCores?: number
  tensorCoresBy?: string
}

/** N(0, 1) on the device at once: rows of a small table, drawn at random. [rows, ...shape] */
export function noise(device: Device, dtype: FloatDtype, seed: number, rows: number, ...shape: number[]): Tensor {
  return scope(() => {
    const size = [Math.min(1024, rows), shape.reduce((a, b) => a * b, 1)] as const
    const table = placed(normal(new Random(seed), size).data as Float64Array, size, dtype, device)
    const ids = randomIds([rows], { low: 0, high: size[0], seed: BigInt(seed), device })
    return embedding(table, ids).view([rows, ...shape])
  })
}

function productOf(device: Device, dtype: FloatDtype, n: number): number {
  return scope(() => {
    const [x, w] = [noise(device, dtype, 1, n, n), noise(device, dtype, 2, n, n)]
    const calls = capture(() => linear(x, w))
    const seconds = secondsOf(`product ${dtype}`, calls.phases[0]!, device)
    calls.dispose()
    return round((2 * n ** 3) / seconds / 1e9)
  })
}

/** @param sameRun what peers gave in this run */
export function measureCeilings(device: Device, sameRun: readonly PeerRow[]): Ceiling {
  if (device === 'cpu') {
    const { gflops, gbps } = native.ceilings()
    return { gbps: round(gbps), product: { float32: round(gflops) } }
  }
  const bytes = 2 ** 30
  const copy = scope(() => {
    const x = Tensor.zeros([bytes / 4], { device })
    const calls = capture(() => scope(() => void cast(x, 'int32'))) // 4 bytes in, 4 out
    const seconds = secondsOf('copy', calls.phases[0]!, device)
    calls.dispose()
    return seconds
  })
  const product = { bfloat16: productOf(device, 'bfloat16', 8192), float32: productOf(device, 'float32', 4096) }
  const key = { case: 'ceiling.gemm', M: 8192, N: 8192, K: 8192 }
  const now = sameRun.find(row => row.case === key.case)?.cublas
  const published = publishedPeers(key).value
  const [tensorCores, tensorCoresBy] =
    typeof now === 'number'
      ? [1e3 * now, 'cuBLAS through PyTorch, this run']
      : typeof published === 'number'
        ? [1e3 * published, 'cuBLAS, bench/peers']
        : [product.bfloat16, 'our own product, this run']
  return { gbps: round((2 * bytes) / copy / 1e9), product, tensorCores, tensorCoresBy }
}
