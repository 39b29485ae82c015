import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { type Device, memory, Tensor } from '#lib/tensor.js'
import { preset } from '#lib/train/presets.js'
import { Trainer } from '#lib/train/trainer.js'
import { benchCase, type Row, type Run } from './harness.js'
import { mlShape, precisions } from './training_step.case.js'

const kSamples = 20
const kMiB = 2 ** 20
/** Growth allowed over the last quarter of the steps. */
const limits = { tensors: 0, used: kMiB / 16, reserved: 32 * kMiB, arrayBuffers: kMiB, heap: 4 * kMiB, rss: 32 * kMiB }
type Watched = keyof typeof limits

setFlagsFromString('--expose-gc')
const collect = runInNewContext('gc') as () => void

type Sample = Record<'step' | 'tensors' | 'used' | 'peak' | 'reserved' | 'heap' | 'arrayBuffers' | 'rss', number>

function sample(step: number, device: Device): Sample {
  const one = Tensor.zeros([1], { device })
  one.item() // waits for what was enqueued
  one.dispose()
  const { tensors } = memory() // before the collector frees what nothing else did
  collect()
  const { rss, heapUsed: heap, arrayBuffers } = process.memoryUsage()
  const { used, peak, reserved } = memory(device)
  return { step, tensors, used, peak, reserved, heap, arrayBuffers, rss }
}

/** What is held however much garbage there is: the least of the last quarter's samples less the least of the quarter before. */
function growth(samples: readonly Sample[], name: Watched): number {
  const quarter = samples.length >> 2
  const least = (part: readonly Sample[]) => Math.min(...part.map(s => s[name]))
  return least(samples.slice(-quarter)) - least(samples.slice(-2 * quarter, -quarter))
}

/** Trains for `steps` steps on batches of changing size, and reads the memory of device and host on the way. */
async function soak(model: 'hstu' | 'sasrec', precision: 'float32' | 'bf16', { device, options }: Run): Promise<Row> {
  const dataset = mlShape('lognormal', 1024)
  const stepsPerEpoch = Math.ceil(dataset.numUsers / 128)
  const every = Math.ceil(options.steps / kSamples)
  const trainer = new Trainer(dataset, {
    model: preset(`ml-1m/${model}`).model(dataset.numItems),
    options: {
      ...{ part: 'all', epochs: Math.ceil(options.steps / stepsPerEpoch), evaluateEvery: 0 },
      ...(precision === 'float32' ? {} : { precision }),
    },
    tensors: { device },
  })
  // Graphs of all shapes first, which are kept: batches of users of about one length go through all numbers of tokens.
  const length = (user: number) => dataset.offsets[user + 1]! - dataset.offsets[user]!
  const byLength = Int32Array.from({ length: dataset.numUsers }, (_, user) => user).sort(
    (a, b) => length(a) - length(b),
  )
  if (device !== 'cpu')
    for (let first = 0; first + 128 <= byLength.length; first += 8)
      await trainer.step(byLength.subarray(first, first + 128)).loss
  const samples: Sample[] = []
  for await (const event of trainer.run())
    if (event.type === 'step' && event.step % every === 0) samples.push(sample(event.step, device))
  trainer.dispose()
  const watched = Object.keys(limits) as Watched[]
  const grown = Object.fromEntries(watched.map(name => [name, growth(samples, name)]))
  const flat = watched.every(name => grown[name]! <= limits[name])
  const names = Object.keys(samples[0]!) as (keyof Sample)[]
  const columns = names.map(name => [name, samples.map(s => s[name])] as const)
  const shape = { case: 'soak', model, steps: options.steps, B: 128, lengths: 'lognormal', dtype: precision }
  return { ...shape, unit: 'bytes', flat, growth: grown, limits, samples: Object.fromEntries(columns) }
}

benchCase('soak', {
  dtypes: ['float32'],
  byName: true,
  run: async run => {
    const rows: Row[] = []
    for (const model of ['hstu', 'sasrec'] as const)
      for (const precision of precisions(run.device)) rows.push(await soak(model, precision, run))
    run.keep(rows)
    for (const row of rows)
      process.stdout.write(`${row.model} ${row.dtype}: growth in bytes ${JSON.stringify(row.growth)}\n`)
    for (const row of rows)
      if (!row.flat) throw new Error(`memory grew in ${run.options.steps} steps: ${JSON.stringify(row.growth)}`)
    return rows
  },
})
