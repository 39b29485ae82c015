import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { buildIfMissing, hstu, temporaryFolder } from './process.js'

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
    expect(report.curve.length).toBeGreaterThan(2)
    expect(readFileSync(at('run/curve.svg'), 'utf8')).toMatch(/^<svg/)

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
