import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { buildIfMissing, cli, hstu, temporaryFolder } from './process.js'

beforeAll(buildIfMissing)
const folder = temporaryFolder()
const at = (name: string) => join(folder, name)

describe('rank train', () => {
  it('trains on prepared records and reports beside the baselines', async () => {
    const sizes = ['users=30', 'items=60', 'categories=10', 'days=6'].flatMap(pair => ['--set', pair])
    await hstu(['data', 'prepare', '--preset', 'ranking/synthetic', ...sizes, '--out', at('requests')])
    const small = ['--batch-size', '16', '--set', 'windowEvery=2', '--model-set', 'layers=1', '--device', 'cpu']
    const args = ['rank', 'train', '--preset', 'ranking/synthetic', '--requests', at('requests'), '--out', at('run')]
    const made = await hstu([...args, ...small, '--task', 'like = LIKE', '--passes', '2'])
    expect(made).toMatchObject({ code: 0 })
    expect(made.stdout).toMatch(/^like +running base rate +\d\.\d{4} /m)
    expect(made.stdout).toMatch(/^like +GenerativeRanker +\d\.\d{4} +0\.\d{4} /m)
    const report = JSON.parse(readFileSync(at('run/report.json'), 'utf8'))
    expect(report).toMatchObject({ command: 'rank train', preset: 'ranking/synthetic', seed: 0, model: { layers: 1 } })
    expect(report.options).toMatchObject({ passes: 2, batchSize: 16 })
    const { requests, countedFrom } = report.records
    expect(countedFrom).toBe(Math.floor(0.8 * requests))
    expect(report.steps).toBe(2 * Math.ceil(countedFrom / 16) + Math.ceil((requests - countedFrom) / 16))
    expect(report.counted.like.weight).toBe(report.baselines[0].metrics.weight)
    const named = report.baselines.map(({ baseline }: { baseline: string }) => baseline)
    expect(named).toContain('logistic regression, ids + running means + similarity-weighted history + recency')
    expect(named).not.toContain('DIN, one pass')
    expect(report.curve.length).toBeGreaterThan(2)
    expect(readFileSync(at('run/curve.svg'), 'utf8')).toMatch(/^<svg/)
    expect(made.stdout.startsWith(readFileSync(at('run/report.txt'), 'utf8').trimEnd())).toBe(true)

    const refused = await hstu([...args, ...small])
    expect(refused).toMatchObject({ code: 1, stdout: '' })
    expect(refused.stderr).toMatch(/already holds a run: add --resume/)
    const again = await hstu([...args, '--resume', '--json', '--device', 'cpu'])
    expect(JSON.parse(again.stdout).counted).toEqual(report.counted)

    const evaluate = ['rank', 'eval', '--checkpoint', at('run')]
    const evaluated = await hstu([...evaluate, '--requests', at('requests'), '--from', String(requests - 5), '--json'])
    const { metrics, learnt, first } = JSON.parse(evaluated.stdout)
    expect([learnt, first]).toEqual([requests, requests - 5])
    expect(metrics.like.weight).toBeGreaterThan(4)
    expect(metrics.like.weight).toBeLessThan(report.counted.like.weight)
    const text = await hstu([...evaluate, '--requests', at('requests')])
    expect(text.stdout).toMatch(/the run has learnt from those before \d+: the figures flatter/)
    expect(text.stdout).toMatch(/^like +GenerativeRanker +\d\.\d{4} /m)
    expect((await hstu(evaluate)).stderr).toMatch(/has no records of its own: give --requests/)
  })

  it('shortens, samples and bounds, and says what that left out', async () => {
    const args = ['rank', 'train', '--preset', 'ranking/synthetic', '--requests', at('requests'), '--device', 'cpu']
    const less = [
      '--set',
      'supervise=new',
      '--set',
      'userRate=2',
      '--set',
      'maxHistory=20',
      '--stochastic-length',
      '1.3',
    ]
    const table = ['--model-set', 'embeddings=hash', '--set', 'tableRows=60', '--set', 'whenFull=skip']
    const made = await hstu([...args, '--out', at('less'), ...less, ...table])
    expect(made).toMatchObject({ code: 0 })
    expect(made.stdout).toMatch(
      /^Stochastic Length 1.3 \(weighted\): [1-9]\d* of \d+ histories cut to 10 of at most 40/m,
    )
    expect(made.stdout).toMatch(/^learnt from \d+ of \d+ requests$/m)
    expect(made.stdout).toMatch(/^embeddings: 59 ids; 0 evicted, [1-9]\d* times no room$/m)
    const report = JSON.parse(readFileSync(at('less/report.json'), 'utf8'))
    expect(report.options).toMatchObject({ stochasticLength: 1.3, lengthSelection: 'weighted', userRate: 2 })
    expect(report.sparsity).toMatchObject({ maxTokens: 40, bound: 10, sequences: report.sampled.trained })
    expect(report.table).toMatchObject({ ids: 59, evicted: 0 })
  })

  it('killed again and again, ends with the report of an uninterrupted run', async () => {
    const options = ['supervise=history', 'checkpointEvery=2', 'windowEvery=2', 'window=40', 'stochasticLength=1.4']
    const table = ['embeddings=hash', 'layers=1'].flatMap(pair => ['--model-set', pair])
    const args = [
      ...['rank', 'train', '--preset', 'ranking/synthetic', '--requests', at('requests'), '--batch-size', '4'],
      ...['--passes', '2', '--device', 'cpu', ...options.flatMap(pair => ['--set', pair]), ...table],
    ]
    expect(await hstu([...args, '--out', at('whole')])).toMatchObject({ code: 0 })
    const manifest = at('killed/checkpoint/manifest.json')
    const stepOf = () => (existsSync(manifest) ? JSON.parse(readFileSync(manifest, 'utf8')).step : -1)
    const kill = async (step: number) => {
      const child = spawn(process.execPath, [cli, ...args, '--out', at('killed'), ...(step > 0 ? ['--resume'] : [])])
      const timer = setInterval(() => stepOf() >= step && child.kill('SIGKILL'), 2)
      const [, signal] = await once(child, 'close')
      clearInterval(timer)
      expect(signal).toBe('SIGKILL')
      expect(existsSync(at('killed/report.json'))).toBe(false)
    }
    for (const step of [0, 7, 20, 41]) await kill(step)
    expect(await hstu([...args, '--out', at('killed'), '--resume'])).toMatchObject({ code: 0 })
    const [whole, killed] = ['whole', 'killed'].map(name => JSON.parse(readFileSync(at(`${name}/report.json`), 'utf8')))
    for (const key of ['steps', 'impressions', 'counted', 'lifetime', 'curve', 'sparsity', 'table'])
      expect(killed[key], key).toEqual(whole[key])
    expect(whole.curve.length).toBeGreaterThan(10)
    const { stdout } = await hstu(['rank', 'eval', '--checkpoint', at('whole'), '--requests', at('requests'), '--json'])
    const other = await hstu(['rank', 'eval', '--checkpoint', at('killed'), '--requests', at('requests'), '--json'])
    expect(JSON.parse(other.stdout).metrics).toEqual(JSON.parse(stdout).metrics)
  })

  it('reports DIN after one pass and several, over the same impressions, where it is asked to', async () => {
    const args = ['rank', 'train', '--preset', 'ranking/synthetic', '--requests', at('requests'), '--out', at('din')]
    const made = await hstu([...args, '--device', 'cpu', '--baselines', 'all', '--json', '--task', 'like = LIKE'])
    const { counted, baselines } = JSON.parse(made.stdout)
    const din = baselines.filter(({ baseline }: { baseline: string }) => baseline.startsWith('DIN'))
    expect(din.map(({ baseline }: { baseline: string }) => baseline)).toEqual(['DIN, one pass', 'DIN, 3 passes'])
    for (const { metrics } of din) expect(metrics.weight).toBe(counted.like.weight)
    expect(din[0].metrics.ne).not.toBe(din[1].metrics.ne)
  })

  it('ablates: a row a variant, each trained on the same records', async () => {
    const args = ['rank', 'ablate', '--preset', 'ranking/synthetic', '--requests', at('requests'), '--device', 'cpu']
    const made = await hstu([...args, '--out', at('ablation'), '--task', 'like = LIKE', '--model-set', 'layers=1'])
    expect(made).toMatchObject({ code: 0 })
    expect(made.stdout).toMatch(/^like +interleaved, all positions +\d\.\d{4} +0\.\d{4} /m)
    expect(made.stdout).toMatch(/^like +additive, candidates only, no time bias +\d\.\d{4} /m)
    const { rows, command } = JSON.parse(readFileSync(at('ablation/report.json'), 'utf8'))
    expect(command).toBe('rank ablate')
    expect(made.stdout.startsWith(readFileSync(at('ablation/report.txt'), 'utf8').trimEnd())).toBe(true)
    const ne = rows.map((row: { counted: { like: { ne: number } } }) => row.counted.like.ne)
    expect(ne).toHaveLength(7)
    expect(new Set(ne).size).toBe(6) // the preset supervises candidates
    const weights = rows.map((row: { counted: { like: { weight: number } } }) => row.counted.like.weight)
    expect(new Set(weights).size).toBe(1)
  })

  it('says what is wrong and leaves no run behind', async () => {
    const train = (...args: string[]) => hstu(['rank', 'train', '--out', at('bad'), ...args])
    expect(await train('--preset', 'ranking/netflix')).toMatchObject({
      ...{ code: 1, stderr: expect.stringMatching(/unknown preset 'ranking\/netflix'. Presets: ranking\/ml-100k/) },
    })
    expect(await train('--preset', 'ranking/ml-100k')).toMatchObject({
      ...{ code: 2, stderr: expect.stringMatching(/--data names the folder of a preset/) },
    })
    const synthetic = ['--preset', 'ranking/synthetic', '--requests', at('requests')]
    expect(await train(...synthetic, '--set', 'epochs=3')).toMatchObject({
      ...{ code: 1, stderr: expect.stringMatching(/unknown training option 'epochs'/) },
    })
    expect(await train(...synthetic, '--model-set', 'depth=3')).toMatchObject({
      ...{ code: 1, stderr: expect.stringMatching(/unknown option 'depth' of the model/) },
    })
    expect(existsSync(at('bad/checkpoint'))).toBe(false)
  })
})
