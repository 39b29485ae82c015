import { execFileSync } from 'node:child_process'
import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { loadCheckpoint } from '#lib/train/checkpoint.js'
import { presetNames } from '#lib/train/presets.js'
import { buildIfMissing, cli, hstu, type Result, temporaryFolder, writeActions } from './process.js'

beforeAll(buildIfMissing)
const folder = temporaryFolder()
const { data, titles } = writeActions(folder)
const at = (name: string) => join(folder, name)

/** The rows of the table of metrics, as printed by train and eval. */
const metricRows = (text: string) => text.split('\n').filter(line => /^(@|HR|NDCG|MRR) /.test(line))
const expectUsageError = (result: Result, message: RegExp) => {
  expect(result.stderr).toMatch(message)
  expect(result.stderr).toMatch(/^Usage: hstu/m)
  expect(result).toMatchObject({ code: 2, stdout: '' })
}
const expectError = (result: Result, code: string, message: RegExp) => {
  expect(result.stderr).toMatch(message)
  expect(result.stderr).toMatch(new RegExp(`\\(${code}\\)\n`))
  expect(result.stderr).not.toMatch(/^ {4}at /m)
  expect(result).toMatchObject({ code: 1, stdout: '' })
}

describe('command line', () => {
  it('lists the commands', async () => {
    const { code, stdout } = await hstu(['--help'])
    expect(code).toBe(0)
    for (const name of ['demo', 'train', 'eval', 'recommend', 'data inspect', 'doctor', 'selftest'])
      expect(stdout).toMatch(new RegExp(`^ {2}${name} `, 'm'))
  })

  it.each(['demo', 'train', 'eval', 'recommend', 'data inspect', 'doctor', 'selftest'])('helps with %s', async name => {
    const { code, stdout } = await hstu([...name.split(' '), '--help'])
    expect(code).toBe(0)
    expect(stdout).toMatch(new RegExp(`^Usage: hstu ${name}`))
    expect(stdout).toMatch(/--json/)
    expect(stdout).toMatch(/Example:\n {2}hstu /)
  })

  it('gives the version', async () => {
    const { version } = JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8')) as {
      version: string
    }
    expect((await hstu(['--version'])).stdout).toBe(`${version}\n`)
  })

  it('names what was probably meant', async () => {
    expectUsageError(await hstu(['tarin']), /unknown command 'tarin'\. Did you mean train\?/)
    expectUsageError(await hstu(['train', '--epoch', '3']), /unknown option '--epoch'\. Did you mean --epochs\?/)
    expectUsageError(await hstu(['data', 'inspekt']), /Did you mean data inspect\?/)
  })

  it('refuses values that make no sense', async () => {
    expectUsageError(
      await hstu(['train', '--data', data, '--preset', 'x', '--epochs', 'many']),
      /--epochs expects a whole number/,
    )
    expectUsageError(await hstu(['train', '--data', data, '--preset', 'x', '--split', 'none']), /one of valid, paper/)
    expectUsageError(
      await hstu(['train', '--data', data, '--preset', 'x', '--precision', 'fp8']),
      /--precision expects one of float32, bf16, got 'fp8'/,
    )
    expectError(
      await hstu(['train', '--data', data, '--preset', 'ml-100k/hstu', '--precision', 'bf16', '--device', 'cpu']),
      'ERR_HSTU_INVALID_ARGUMENT',
      /precision 'bf16' computes on CUDA alone, the device here is 'cpu'/,
    )
    expectUsageError(await hstu(['train', '--preset', 'ml-100k/hstu']), /--data is required/)
    expectUsageError(await hstu(['data', 'inspect']), /FILE is missing/)
    expectUsageError(await hstu(['data', 'inspect', data, '--mapping', 'user']), /--mapping expects role=column/)
  })

  it('names the presets, options and devices there are', async () => {
    const wrong = await hstu(['train', '--data', data, '--preset', 'ml-100k/nothing', '--out', at('never')])
    expectError(wrong, 'ERR_HSTU_INVALID_ARGUMENT', /unknown preset 'ml-100k\/nothing'/)
    for (const name of presetNames) expect(wrong.stderr).toContain(name)
    const base = ['train', '--data', data, '--preset', 'ml-100k/hstu', '--out', at('never')]
    expectError(
      await hstu([...base, '--set', 'speed=9']),
      'ERR_HSTU_INVALID_ARGUMENT',
      /unknown training option 'speed'/,
    )
    expectError(await hstu([...base, '--model-set', 'layer=9']), 'ERR_HSTU_INVALID_ARGUMENT', /Did you mean layers\?/)
    expect(existsSync(at('never'))).toBe(false)
  })

  it('shows the stack of an error when asked', async () => {
    const { stderr } = await hstu(['data', 'inspect', at('absent')], { env: { HSTU_DEBUG: '1' } })
    expect(stderr).toMatch(/no such file \(ERR_HSTU_DATA\)\n[\s\S]*^ {4}at /m)
  })

  it('ends quietly when nobody reads', () => {
    const script = '"$0" "$1" data inspect "$2" --json | true'
    const text = execFileSync('sh', ['-c', `{ ${script}; } 2>&1`, process.execPath, cli, data], { encoding: 'utf8' })
    expect(text).toBe('')
  })

  it('fails before the work when the run folder cannot be made', async () => {
    writeFileSync(at('occupied'), '')
    const { code, stderr } = await hstu(['demo', '--out', join(at('occupied'), 'run')])
    expect(stderr).toMatch(/^error: .*occupied.* cannot be written: ENOTDIR.*\(ERR_HSTU_CHECKPOINT\)/)
    expect(stderr).not.toMatch(/^ {4}at /m)
    expect(code).toBe(1)
  })

  it('does not fall back from cuda', async () => {
    const { cuda } = JSON.parse((await hstu(['doctor', '--json'])).stdout) as { cuda: { usable: boolean } }
    if (cuda.usable) return
    expectError(
      await hstu(['selftest', '--device', 'cuda']),
      'ERR_HSTU_CUDA_UNAVAILABLE',
      /device cuda: .*; use --device cpu/,
    )
  })
})

describe('data inspect', () => {
  it('describes a file', async () => {
    const { code, stdout } = await hstu(['data', 'inspect', data])
    expect(code).toBe(0)
    expect(stdout).toMatch(/tiny: 60 users, 40 items, \d+ actions/)
    expect(stdout).toMatch(/█/)
    expect(stdout).toMatch(/1 user with fewer than 3 actions skipped \(1 action\)/)
  })

  it('gives JSON', async () => {
    const { stdout } = await hstu(['data', 'inspect', data, '--json', '--top', '2'])
    expect(JSON.parse(stdout)).toMatchObject({ users: 60, items: 40, stats: { skippedUsers: 1 } })
    expect(JSON.parse(stdout).popularItems).toHaveLength(2)
  })

  it('names file and line of what is malformed', async () => {
    const bad = at('bad.inter')
    writeFileSync(bad, `${readFileSync(data, 'utf8')}u1\ti1\tNaN\t5\n`)
    const lines = readFileSync(bad, 'utf8').trimEnd().split('\n').length
    expectError(
      await hstu(['data', 'inspect', bad]),
      'ERR_HSTU_DATA',
      new RegExp(`bad\\.inter:${lines}: expected a finite`),
    )
    expectError(await hstu(['data', 'inspect', at('absent.inter')]), 'ERR_HSTU_DATA', /no such file/)
  })
})

describe('train, eval, recommend', () => {
  const small = ['dim=16', 'qkDim=16', 'vDim=16', 'layers=1', 'maxLength=20', 'paddedLength=24']
  const recipe = [
    ...['--data', data, '--preset', 'ml-100k/hstu', '--seed', '3', '--epochs', '30', '--evaluate-every', '1'],
    ...['--batch-size', '16', '--lr', '0.01', '--patience', '0', '--set', 'numNegatives=8'],
    ...small.flatMap(setting => ['--model-set', setting]),
  ]
  const whole = at('whole')
  let trained: Result

  beforeAll(async () => {
    trained = await hstu(['train', ...recipe, '--out', whole])
  })

  it('trains, tells how it goes and writes the run', () => {
    expect(trained.stderr).toMatch(/epoch 30\/30 {2}loss [\d.]+ {2}valid HR@10/)
    expect(trained).toMatchObject({ code: 0 })
    expect(trained.stdout).toMatch(/^best epoch \d+ of 30, chosen on validation/)
    expect(metricRows(trained.stdout)).toHaveLength(4)
    const report = JSON.parse(readFileSync(join(whole, 'report.json'), 'utf8'))
    expect(report).toMatchObject({ preset: 'ml-100k/hstu', seed: 3, epochs: 30, test: { users: 60 } })
    expect(report.test['hr@10']).toBeGreaterThan(0.5)
    expect(report.best.chosenOn).toBe('valid')
    const curve = readFileSync(join(whole, 'curve.svg'), 'utf8')
    expect(curve).toMatch(/^<svg/)
    expect(curve).toMatch(/validation NDCG@10/)
  })

  it('gives the same numbers by eval, from the run and from its best model', async () => {
    for (const checkpoint of [whole, join(whole, 'best')]) {
      const { code, stdout } = await hstu(['eval', '--checkpoint', checkpoint, '--data', data])
      expect(code).toBe(0)
      expect(metricRows(stdout)).toEqual(metricRows(trained.stdout))
    }
    const { stdout } = await hstu(['eval', '--checkpoint', whole, '--data', data, '--json', '--filter-seen', 'none'])
    expect(JSON.parse(stdout)).toMatchObject({ stage: 'test', filterSeen: 'none', metrics: { users: 60 } })
  })

  it('does not overwrite a run', async () => {
    const again = await hstu(['train', ...recipe, '--out', whole])
    expectError(again, 'ERR_HSTU_INVALID_ARGUMENT', /already holds a run .*--resume/)
  })

  it('is interrupted, says how to go on, and ends with the same bits', async () => {
    const out = at('interrupted')
    let sent = false
    const stopped = await hstu(['train', ...recipe, '--out', out], {
      watch(stderr, child) {
        if (sent || !stderr.includes('epoch 2/30  loss')) return
        sent = true
        child.kill('SIGINT')
      },
    })
    expect(stopped).toMatchObject({ code: 130, stdout: '' })
    const line = /to go on: {2}(.*)\n/.exec(stopped.stderr)?.[1]
    expect(line).toMatch(/^node .*cli\.js train .* --resume$/)

    const changed = await hstu(['train', '--resume', '--data', data, '--out', out, '--lr', '0.5'])
    expectError(changed, 'ERR_HSTU_INVALID_ARGUMENT', /started with lr=0\.01 and cannot go on with 0\.5/)
    const words = line!.split(' ').slice(2)
    const resumed = await hstu([...words, '--json'])
    expect(resumed.stderr).toMatch(/going on at step \d+/)
    expect(resumed.code).toBe(0)
    expect(JSON.parse(resumed.stdout)).toMatchObject({ epochs: 30, test: { users: 60 } })
    for (const part of ['checkpoint', 'best']) {
      const [a, b] = [await loadCheckpoint(join(whole, part)), await loadCheckpoint(join(out, part))]
      expect(b.step).toBe(a.step)
      expect(b.tensors).toEqual(a.tensors)
    }
  })

  it('says when the epoch was chosen on test', async () => {
    const { stdout } = await hstu(['train', ...recipe, '--epochs', '2', '--split', 'paper', '--out', at('paper')])
    expect(stdout).toMatch(/chosen on TEST/)
    const report = JSON.parse(readFileSync(join(at('paper'), 'report.json'), 'utf8'))
    expect(report).toMatchObject({ split: 'paper', best: { chosenOn: 'test' } })
  })

  it('keeps a model without any evaluation', async () => {
    const base = ['train', ...recipe, '--epochs', '1', '--evaluate-every', '0', '--out', at('unevaluated')]
    const { code, stdout } = await hstu(base)
    expect(code).toBe(0)
    const again = await hstu(['eval', '--checkpoint', at('unevaluated'), '--data', data])
    expect(metricRows(again.stdout)).toEqual(metricRows(stdout))
  })

  it('recommends with titles', async () => {
    const base = ['recommend', '--checkpoint', whole, '--data', data]
    const text = await hstu([...base, '--user', 'u1', '--user', 'u2', '--k', '3', '--items', titles])
    expect(text.code).toBe(0)
    expect(text.stdout).toMatch(/^user u1: \d+ actions/)
    expect(text.stdout).toMatch(/^1 +i\d+ +-?\d\.\d{4} {2}Title \d+$/m)
    const { stdout } = await hstu([...base, '--user', 'u1', '--json', '--time', '1700000000'])
    const answers = JSON.parse(stdout)
    expect(answers).toMatchObject([{ user: 'u1' }])
    expect(answers[0].recommendations).toHaveLength(10)
    const unknown = await hstu([...base, '--user', 'nobody'])
    expectError(unknown, 'ERR_HSTU_INVALID_ARGUMENT', /user 'nobody' is not in .* such as u0, u1/)
  })

  it('refuses other data and a damaged model', async () => {
    const other = at('other.txt')
    writeFileSync(other, 'a x y z\nb x z y\n')
    const wrong = await hstu(['eval', '--checkpoint', whole, '--data', other])
    expectError(wrong, 'ERR_HSTU_DATA', /its items are not those that the model was trained on/)
    expectError(
      await hstu(['eval', '--checkpoint', at('absent'), '--data', data]),
      'ERR_HSTU_CHECKPOINT',
      /no such folder/,
    )
  })
})

describe('demo', () => {
  it('compares the models with the oracle', async () => {
    const out = at('demo')
    const { code, stdout } = await hstu(['demo', '--records', '600', '--out', out])
    expect(code).toBe(0)
    for (const name of ['popularity', 'SASRec', 'HSTU', 'oracle'])
      expect(stdout).toMatch(new RegExp(`^${name} .*0\\.\\d{4}`, 'm'))
    expect(stdout).toMatch(/top 10 that HSTU recommends/)
    expect(readFileSync(join(out, 'curve.svg'), 'utf8')).toMatch(/<svg[\s\S]*SASRec/)
    expect(JSON.parse(readFileSync(join(out, 'report.json'), 'utf8'))).toMatchObject({ seed: 1, records: 600 })
  })

  it('gives JSON alone on stdout', async () => {
    const { stdout } = await hstu(['demo', '--records', '200', '--json', '--out', at('demo-json')])
    const report = JSON.parse(stdout) as { models: { name: string }[] }
    expect(report.models.map(({ name }) => name)).toEqual(['SASRec', 'HSTU'])
  })
})

describe('doctor and selftest', () => {
  it('describes the installation', async () => {
    const { code, stdout } = await hstu(['doctor'], { env: { HSTU_NUM_THREADS: '1' } })
    expect(code).toBe(0)
    expect(stdout).toMatch(/^threads +1, from HSTU_NUM_THREADS=1$/m)
    expect(stdout).toMatch(/^ceilings +\d+ GFLOP\/s/m)
    expect(JSON.parse((await hstu(['doctor', '--json'])).stdout)).toMatchObject({ ok: true, addon: { works: true } })
  })

  it('checks an op', async () => {
    const { code, stdout } = await hstu(['selftest', '--filter', 'add'])
    expect(stdout).toMatch(/^\d+ checks of 1 op on cpu in [\d.]+ s: all hold$/m)
    expect(code).toBe(0)
    const none = await hstu(['selftest', '--filter', 'nothing'])
    expectError(none, 'ERR_HSTU_INVALID_ARGUMENT', /no op matches 'nothing'\. Ops: .*add, /)
  })
})
