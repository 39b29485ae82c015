import Benchmark from 'benchmark'
import { native } from '#lib/native.js'
import { type Device, Tensor, unscoped } from '#lib/tensor.js'

const kFlush = 2 ** 25 // floats of each of two tensors, 256 MiB in all: past any L2
const kSampleSeconds = 0.012
const kSamples = 7

export const median = (values: readonly number[]) => [...values].sort((a, b) => a - b)[values.length >> 1]!

interface Stream {
  /** Waits until the device has done all that was enqueued. */
  wait: () => void
  /** Overwrites the L2 cache. */
  flush: () => void
}

let stream: Stream | null = null

function streamOf(device: Device): Stream {
  return (stream ??= unscoped(() => {
    const [y, x] = [Tensor.zeros([kFlush], { device }), Tensor.zeros([kFlush], { device })]
    const one = Tensor.zeros([1], { device })
    return { wait: () => void one.dataSync(), flush: () => native.add(y, x, x) }
  }))
}

/**
 * Seconds of device time. The addon has no events, so a sample enqueues `count` times (an L2 flush, the calls) between two waits, and as
 * many flushes alone, and takes the difference: what waiting costs cancels, and the flush (60 us) covers what enqueueing costs on the
 * host. Median of seven samples of 12 ms or more.
 */
function deviceSeconds(calls: () => void, device: Device): number {
  const { wait, flush } = streamOf(device)
  const run = (count: number, body: (() => void) | null) => {
    wait()
    const start = performance.now()
    for (let i = 0; i < count; i++) {
      flush()
      body?.()
    }
    wait()
    return (performance.now() - start) / 1e3 / count
  }
  const difference = (count: number) => run(count, calls) - run(count, null)
  run(3, calls)
  const count = Math.min(128, Math.max(1, Math.ceil(kSampleSeconds / Math.max(difference(3), 1e-6))))
  return Math.max(median(Array.from({ length: kSamples }, () => difference(count))), 1e-9)
}

/** Seconds that `calls` take: on the CPU the median of Benchmark's samples. */
export function secondsOf(name: string, calls: () => void, device: Device): number {
  if (device !== 'cpu') return deviceSeconds(calls, device)
  const bench = new Benchmark(name, calls, { minSamples: 5, maxTime: 1 })
  bench.run()
  if (bench.error) throw bench.error
  return median(bench.stats.sample)
}
