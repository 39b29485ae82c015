import { valueAndGrad } from '#lib/autograd.js'
import { add } from '#lib/ops/add.js'
import { scope, Tensor } from '#lib/tensor.js'
import { benchCase, type Row, round } from './harness.js'

const CALLS = 1000

/** Microseconds of this thread for each of CALLS calls: the median of 31 runs, the device idle at the start of each. */
function microseconds(fn: () => void, wait: Tensor): number {
  const samples = Array.from({ length: 41 }, () => {
    wait.dataSync()
    const start = performance.now()
    fn()
    return ((performance.now() - start) * 1e3) / CALLS
  })
  return samples.slice(10).sort((a, b) => a - b)[15]!
}

const repeat = (fn: () => void) => {
  for (let i = 0; i < CALLS; i++) fn()
}

/** What a call costs the host beside the work itself: one element, so that on CUDA the launch is all there is to do. */
benchCase('op_overhead', {
  dtypes: ['float32'],
  run: ({ device, dtype }) =>
    scope((): Row[] => {
      const x = Tensor.from([1], [1], { device })
      const ids = BigInt64Array.from({ length: 512 }, (_, i) => BigInt(i))
      const target = Tensor.from(ids, [512], { device })
      const chain = () => {
        let y = x
        for (let i = 0; i < CALLS; i++) y = add(y, x)
        return y
      }
      const rows: [string, () => void][] = [
        ['add', () => scope(() => void chain())],
        ['add and its backward', () => scope(() => void valueAndGrad([x], chain))],
        ['empty and dispose', () => repeat(() => Tensor.empty([1], { device }).dispose())],
        // As a step makes and frees them: V8 is told of them, and must not collect each time.
        ['empty of 512 KB, freed together', () => scope(() => repeat(() => void Tensor.empty([1 << 17], { device })))],
        ['view', () => scope(() => repeat(() => void x.view([1, 1])))],
        ['write of 4 KB', () => repeat(() => target.write(ids))],
      ]
      return rows.map(([name, fn]) => ({ case: name, dtype, unit: 'us a call', hstu: round(microseconds(fn, x)) }))
    }),
})
