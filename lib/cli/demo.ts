import { join } from 'node:path'
import { type SyntheticStream, syntheticStream } from '../data/synthetic.js'
import { HstuError } from '../errors.js'
import { evaluate } from '../eval/evaluate.js'
import type { Metrics } from '../eval/metrics.js'
import { type Recommendation, recommend } from '../eval/recommend.js'
import type { ModelSpec } from '../models/create.js'
import type { TensorOptions } from '../tensor.js'
import type { TrainOptions } from '../train/options.js'
import { Trainer } from '../train/trainer.js'
import type { Args } from './args.js'
import { curveHint, smooth, writeCurve } from './curve.js'
import { tensorOptions } from './device.js'
import { interruptible } from './interrupt.js'
import { clock, compact, count, counted, metric, percent, print, printJson, table } from './output.js'
import { Progress } from './progress.js'
import { makeFolder, provenance, writeReport } from './report.js'

const RECORD = 64

// A record less its last action, which is the one to predict: the position after it is never trained.
const shape = {
  dim: 32,
  layers: 2,
  heads: 1,
  maxLength: RECORD - 1,
  paddedLength: RECORD,
  inputDropout: 0,
  linearDropout: 0,
}

const recipes: { name: string; model: (numItems: number) => ModelSpec }[] = [
  {
    name: 'SASRec',
    model: numItems => ({ kind: 'sasrec', config: { ...shape, numItems, ffnDim: shape.dim } }),
  },
  {
    name: 'HSTU',
    model: numItems => ({ kind: 'hstu', config: { ...shape, numItems, qkDim: 32, vDim: 32, timeBias: false } }),
  },
]

// One pass in the order of the stream, as the items appear. The corpus is small enough to score every item: less noise than sampled
// negatives. No decay: items that appear at the end have to be learned as fast as the others.
const recipeOptions: Partial<TrainOptions> = {
  ...{ part: 'all', epochs: 1, shuffle: false, evaluateEvery: 0, filterSeen: 'none' },
  ...{ batchSize: 128, lr: 6e-3, negatives: 'full' },
}

interface Trained {
  name: string
  metrics: Metrics
  losses: number[]
  seconds: number
  tokensPerSecond: number
  recommendations: Recommendation[]
  setting: { model: ModelSpec; options: TrainOptions }
}

export function run(args: Args): Promise<number | undefined> {
  const seed = args.integer('seed') ?? 1
  const numRecords = args.integer('records', 100) ?? 40_000
  const out = args.text('out') ?? join('runs', 'demo')
  return interruptible(async signal => {
    const tensors = tensorOptions(args.text('device'))
    await makeFolder(out) // a folder that cannot be is to fail before the work
    const start = performance.now()
    const stream = syntheticStream({ numItems: 2000, numCategories: 50, recordLength: RECORD, numRecords, seed })
    const shown = showcase(stream)
    process.stderr.write(
      `${count(numRecords)} records of ${RECORD} actions on 2,000 items in 50 categories; ` +
        'the first 90 % train, in order and once\n',
    )
    const trained: Trained[] = []
    for (const recipe of recipes) trained.push(await train(recipe, stream, { seed, tensors, signal, shown }))
    const oracle = stream.oracle()
    const popularity = stream.popularity()
    const report = {
      ...provenance('demo'),
      ...{ seed, records: numRecords, items: 2000, categories: 50, recordLength: RECORD },
      oracle,
      popularity,
      models: trained.map(({ losses, recommendations, name, metrics, ...rest }) => ({
        ...{ name, hr10: metrics['hr@10']!, hr50: metrics['hr@50']! },
        ...{ shareOfOracleHr10: metrics['hr@10']! / oracle.hr10, shareOfOracleHr50: metrics['hr@50']! / oracle.hr50 },
        ...rest,
        metrics,
        curve: smooth(losses),
      })),
      example: example(stream, shown, trained.at(-1)!.recommendations),
      seconds: (performance.now() - start) / 1e3,
    }
    await writeReport(out, report)
    const hasCurve = await writeCurve(join(out, 'curve.svg'), {
      title: 'Training loss on the synthetic preference stream',
      subtitle: `${count(numRecords)} records, one pass, seed ${seed}`,
      x: 'step',
      y: ['loss'],
      series: trained.map(({ name, losses }) => ({ name, points: smooth(losses) })),
    })
    if (!hasCurve) process.stderr.write(`${curveHint}\n`)
    if (args.flag('json')) printJson(report)
    else printReport(report, trained, out, hasCurve)
    return undefined
  })
}

/** The test record to show: the first with three categories or more. */
function showcase({ testRecords, dataset, categoryOf }: SyntheticStream): number {
  const categories = (record: number) =>
    new Set(dataset.items.subarray(dataset.offsets[record]!, dataset.offsets[record + 1]!).map(i => categoryOf[i]!))
      .size
  return testRecords.find(record => categories(record) === 3) ?? testRecords[0]!
}

async function train(
  recipe: (typeof recipes)[number],
  stream: SyntheticStream,
  { seed, tensors, signal, shown }: { seed: number; tensors: TensorOptions; signal: AbortSignal; shown: number },
): Promise<Trained> {
  const { dataset, trainRecords, testRecords } = stream
  const model = recipe.model(dataset.numItems)
  const options = { ...recipeOptions, seed }
  const trainer = new Trainer(dataset, { model, options, users: trainRecords, tensors })
  const progress = new Progress(recipe.name)
  const losses: number[] = []
  let tokens = 0
  try {
    for await (const event of trainer.run({ signal })) {
      if (event.type === 'interrupted') throw new HstuError('ERR_HSTU_ABORTED', 'the demo was interrupted')
      if (event.type !== 'step') continue
      losses.push(event.loss)
      tokens += event.tokens
      const recent = losses.slice(-20)
      const loss = recent.reduce((a, b) => a + b, 0) / recent.length
      const rate = `${compact(event.tokensPerSecond)} tokens/s`
      progress.update(event.step, event.totalSteps, `loss ${loss.toFixed(3)}  ${rate}  ETA ${clock(event.etaSeconds)}`)
    }
    const { seconds } = trainer.state
    progress.start(`${recipe.name} test`)
    const metrics = await evaluate(trainer.model, dataset, {
      ...{ users: testRecords, filterSeen: 'none', signal },
      onProgress: (done, total) => progress.update(done, total),
    })
    progress.log(`${recipe.name}: HR@10 ${metric(metrics['hr@10']!)} after ${clock(seconds)}`)
    const [recommendations = []] = recommend(trainer.model, dataset, [shown], { filterSeen: 'none' })
    const setting = { model, options: trainer.options }
    return { name: recipe.name, metrics, losses, seconds, tokensPerSecond: tokens / seconds, recommendations, setting }
  } finally {
    progress.clear()
    trainer.dispose()
  }
}

/** One record and what HSTU recommends after it, with categories. */
function example({ dataset, categoryOf }: SyntheticStream, record: number, recommendations: readonly Recommendation[]) {
  const history = Array.from(dataset.items.subarray(dataset.offsets[record]!, dataset.offsets[record + 1]!))
  return {
    record,
    history: history.map(item => ({ item, category: categoryOf[item]! })),
    recommendations: recommendations.map(({ item, score }) => ({ item, category: categoryOf[item]!, score })),
  }
}

function printExample({ record, history, recommendations }: ReturnType<typeof example>): void {
  const counts = new Map<number, number>()
  for (const { category } of history) counts.set(category, (counts.get(category) ?? 0) + 1)
  const order = [...counts].sort(([, x], [, y]) => y - x)
  const recent = history.slice(-24).reverse()
  print(`record ${record}: ${order.map(([c, n]) => `${counted(n, 'action')} in category ${c}`).join(', ')}`)
  const width = Math.max(...order.map(([c]) => `category ${c}`.length))
  const line = (category: number, items: readonly number[]) =>
    print(`  ${`category ${category}`.padEnd(width)}  ${items.length > 0 ? items.join(' ') : '-'}`)
  print(`items of its last ${recent.length} actions, the latest first:`)
  const itemsOf = (list: readonly { item: number; category: number }[], c: number) =>
    list.filter(({ category }) => category === c).map(({ item }) => item)
  for (const [category] of order) line(category, itemsOf(recent, category))
  print('top 10 that HSTU recommends next:')
  const known = [...new Set(recommendations.map(({ category }) => category))]
  for (const category of known) line(category, itemsOf(recommendations, category))
  const inside = recommendations.filter(({ category }) => counts.has(category)).length
  print(`${inside} of ${recommendations.length} are of the record's categories`)
}

interface Report {
  oracle: { hr10: number; hr50: number }
  popularity: { hr10: number; hr50: number }
  example: ReturnType<typeof example>
  seconds: number
}

function printReport(report: Report, trained: readonly Trained[], out: string, hasCurve: boolean): void {
  const { oracle, popularity } = report
  const row = (name: string, hr10: number, hr50: number, rate = '', seconds = '') => [
    ...[name, metric(hr10), percent(hr10 / oracle.hr10), metric(hr50), percent(hr50 / oracle.hr50), rate, seconds],
  ]
  const models = trained.map(({ name, metrics, tokensPerSecond, seconds }) =>
    row(name, metrics['hr@10']!, metrics['hr@50']!, compact(tokensPerSecond), seconds.toFixed(1)),
  )
  print(
    table(
      ['', 'HR@10', 'of oracle', 'HR@50', 'of oracle', 'tokens/s', 'seconds'],
      [row('popularity', popularity.hr10, popularity.hr50), ...models, row('oracle', oracle.hr10, oracle.hr50)],
    ),
  )
  print('\nThe oracle knows how the stream is made: no ranking can expect to do better.\n')
  printExample(report.example)
  print(`\n${clock(report.seconds)} in all; in ${out}: report.json${hasCurve ? ', curve.svg' : ''}`)
}
