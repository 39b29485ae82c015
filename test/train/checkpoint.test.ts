import { spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync } from 'node:fs'
import fs, { mkdir, open, readdir, readFile, rm, truncate, writeFile } from 'node:fs/promises'
import { syncBuiltinESMExports } from 'node:module'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import ts from 'typescript'
import { afterAll, beforeEach, describe, expect, it, onTestFinished, vi } from 'vitest'
import { HstuError } from '#lib/errors.js'
import { memory, Tensor } from '#lib/tensor.js'
import { assignTensors, type CheckpointContent, loadCheckpoint, saveCheckpoint } from '#lib/train/checkpoint.js'
import type { HostTensor } from '#lib/train/safetensors.js'

const root = mkdtempSync(join(tmpdir(), 'hstu-checkpoint-'))
let count = 0
const fresh = () => join(root, `c${count++}`)
afterAll(() => rm(root, { recursive: true, force: true }))

const filled = (value: number, size = 1000): HostTensor => {
  return { dtype: 'float32', shape: [size], data: new Float32Array(size).fill(value) }
}
/** Content whose every part tells the step; `size` values in each of three tensors. */
function contentOf(step: number, size?: number): CheckpointContent {
  const tensors = { model: { a: filled(step, size), b: filled(step, size) }, optimizer: { m: filled(step, size) } }
  return { kind: 'training', tensors, json: { state: { step } }, files: { 'vocabulary.json': `["${step}"]` } }
}
/** Loads, and checks that all parts are of one step; gives the step. */
async function expectWhole(folder: string): Promise<number> {
  const { tensors, ...loaded } = await loadCheckpoint(folder)
  const { tensors: _, ...expected } = contentOf(loaded.step, 0)
  expect(loaded).toEqual({ ...expected, step: loaded.step })
  const all = Object.entries(tensors).flatMap(([group, map]) =>
    [...map].map(([name, { data }]) => ({ group, name, data })),
  )
  expect(all.map(({ group, name }) => `${group}.${name}`)).toEqual(['model.a', 'model.b', 'optimizer.m'])
  for (const { data } of all) expect((data as Float32Array).every(value => value === loaded.step)).toBe(true)
  return loaded.step
}
const manifestOf = async (folder: string) => JSON.parse(await readFile(join(folder, 'manifest.json'), 'utf8'))
async function expectNoLeftovers(folder: string): Promise<void> {
  const { files, texts } = await manifestOf(folder)
  const named = [files, texts].flatMap(x => Object.values<{ file: string }>(x)).map(({ file }) => file)
  expect((await readdir(folder)).sort()).toEqual([...named, 'manifest.json'].sort())
}
const fails = (promise: Promise<unknown>, pattern: RegExp | string, more: object = {}) => {
  const message = expect.stringMatching(pattern)
  return expect(promise).rejects.toMatchObject({ code: 'ERR_HSTU_CHECKPOINT', message, ...more })
}

describe('round trip', () => {
  it('gives back tensors, json and files, and keeps nothing alive', async () => {
    const folder = join(fresh(), 'deep', 'er')
    const before = memory()
    const w = Tensor.from([1, 2, 3, 4, 5, 6], [2, 3])
    const ids = Tensor.from(BigInt64Array.of(7n, -(2n ** 62n)))
    const json = { rates: [0.1, 1e-300, -5], none: null, skipped: undefined, '10': 'ten', '9': {}, text: 'ü\n' }
    const texts = { 'a.b-c.txt': 'ä', plain: '' }
    await saveCheckpoint(folder, 12, { kind: 'model', tensors: { model: { w, ids }, empty: {} }, json, files: texts })
    const { step, kind, tensors, files, ...loaded } = await loadCheckpoint(folder)
    expect({ step, kind, files }).toEqual({ step: 12, kind: 'model', files: texts })
    expect(loaded.json).toEqual(JSON.parse(JSON.stringify(json)))
    expect(tensors.empty!.size).toBe(0)
    const target = { ids: Tensor.zeros([2], { dtype: 'int64' }), w: Tensor.zeros([2, 3]) }
    assignTensors(target, tensors.model!, 'model')
    expect(target.w.dataSync()).toEqual(w.dataSync())
    expect(target.ids.dataSync()).toEqual(ids.dataSync())
    for (const tensor of [w, ids, target.w, target.ids]) tensor.dispose()
    expect(memory()).toEqual(before)
    await expectNoLeftovers(folder)
  })

  it('replaces the checkpoint, cleans up, leaves others\u2019 files alone, and reads only the groups asked for', async () => {
    const folder = fresh()
    await saveCheckpoint(folder, 1, contentOf(1))
    const mine = ['notes.txt', 'model-1.safetensors', 'manifest.json.tmp', 'model-1-0123.safetensors']
    const leftovers = ['gone-3-0123456789abcdef.safetensors', 'manifest.json.0123456789abcdef.tmp']
    for (const name of [...mine, ...leftovers]) await writeFile(join(folder, name), 'x')
    await saveCheckpoint(folder, 2, contentOf(2))
    expect(await expectWhole(folder)).toBe(2)
    expect(await readdir(folder)).toEqual(expect.arrayContaining(mine))
    for (const name of mine) await rm(join(folder, name))
    await expectNoLeftovers(folder)
    expect(Object.keys((await loadCheckpoint(folder, { groups: ['optimizer'] })).tensors)).toEqual(['optimizer'])
    await fails(loadCheckpoint(folder, { groups: ['toString'] }), /'toString'.*model, optimizer/)
  })

  it('takes saves at once one after the other, after a failed one too, with json as it was when called', async () => {
    const folder = fresh()
    const changing = contentOf(3)
    const saves = [1, 2].map(step => saveCheckpoint(folder, step, contentOf(step)))
    const broken = { kind: 'x', json: {}, tensors: { t: { a: { ...filled(1), shape: [7] } } } }
    const failing = fails(saveCheckpoint(folder, 9, broken), /'a'.*7 values.*previous checkpoint of step 2 is intact/)
    saves.push(saveCheckpoint(join(folder, '..', folder.split('/').at(-1)!), 3, changing))
    changing.json.state = 'later'
    await Promise.all([...saves, failing])
    expect(await expectWhole(folder)).toBe(3)
    await expectNoLeftovers(folder)
  })

  it('reads one whole checkpoint while others are saved', async () => {
    const folder = fresh()
    await saveCheckpoint(folder, 0, contentOf(0))
    const saves = Array.from({ length: 30 }, (_, i) => saveCheckpoint(folder, i + 1, contentOf(i + 1)))
    let done = false
    const saving = Promise.all(saves).finally(() => (done = true))
    let last = 0
    while (!done) last = Math.max(last, await expectWhole(folder))
    await saving
    expect(last).toBeGreaterThan(0)
  })
})

describe('a checkpoint that is not as it was saved', () => {
  let folder = ''
  let names: { model: string; text: string }
  beforeEach(async () => {
    folder = fresh()
    await saveCheckpoint(folder, 5, contentOf(5))
    const manifest = await manifestOf(folder)
    names = { model: manifest.files.model.file, text: manifest.texts['vocabulary.json'].file }
  })
  it('has a byte of data, or any one byte of the manifest, changed', async () => {
    const cases: [string, number][] = [[names.text, 2]]
    for (const at of [0, 9, 60, 300, 5000]) cases.push([names.model, at])
    const { length } = await readFile(join(folder, 'manifest.json'))
    for (let at = 0; at < length; at += at < 100 ? 1 : 9) cases.push(['manifest.json', at])
    for (const [file, at] of cases) {
      const data = await readFile(join(folder, file))
      await writeFile(join(folder, file), data.with(at, data[at]! ^ 1))
      await fails(loadCheckpoint(folder), `${file}: `)
      await writeFile(join(folder, file), data)
    }
    expect(await expectWhole(folder)).toBe(5)
  })

  it('has a file cut short, grown, missing, or replaced by a folder', async () => {
    const path = join(folder, names.model)
    const data = await readFile(path)
    await truncate(path, data.length - 1)
    await fails(
      loadCheckpoint(folder),
      `${names.model}: damaged: expected ${data.length} bytes, found ${data.length - 1}`,
    )
    await writeFile(path, Buffer.concat([data, data]))
    await fails(loadCheckpoint(folder), /damaged/)
    await rm(path)
    await fails(loadCheckpoint(folder), `${names.model}: damaged.*no such file`)
    await mkdir(path)
    await fails(loadCheckpoint(folder), /damaged/)
  })

  it('is of another version, or another thing: a save does not replace it', async () => {
    const path = join(folder, 'manifest.json')
    const manifest = await manifestOf(folder)
    const cases: [unknown, RegExp][] = [
      [{ ...manifest, version: 2, library: '7.0.0' }, /version 1, found 2; hstu 7\.0\.0 wrote it: update/],
      [{ ...manifest, version: 0 }, /expected checkpoint version 1, found 0/],
      [{ ...manifest, step: 6 }, /damaged or was edited/],
      [{ name: 'an app', icons: [] }, /expected a manifest of format 'hstu-checkpoint', found undefined/],
      [null, /found undefined/],
      ['{', /expected the manifest of a checkpoint/],
    ]
    for (const [value, message] of cases) {
      const text = typeof value === 'string' ? value : JSON.stringify(value)
      await writeFile(path, text)
      await fails(loadCheckpoint(folder), message)
      await fails(saveCheckpoint(folder, 6, contentOf(6)), message)
      expect(await readFile(path, 'utf8')).toBe(text)
    }
  })

  it('is no checkpoint at all', async () => {
    const none = fresh()
    await fails(loadCheckpoint(none), /expected a checkpoint, a folder with manifest\.json.*ENOENT/)
    await mkdir(none)
    await writeFile(join(none, 'weights.bin'), '')
    await fails(loadCheckpoint(none), /found only \[weights\.bin\]/)
    await fails(loadCheckpoint(join(none, 'weights.bin')), /expected a checkpoint.*ENOTDIR/)
  })
})

describe('a save that fails', () => {
  it.each([
    ['NaN', { json: { a: [1, Number.NaN] } }, /json\.a\[1\].*NaN/],
    ['a bigint', { json: { a: 1n } }, /json\.a.*BigInt/],
    ['a map', { json: { m: new Map() } }, /json\.m.*Map/],
    ['a path as a group', { tensors: { '../x': {} } }, /'\.\.\/x'/],
    ['a path as a file', { files: { 'a/b': '' } }, /'a\/b'/],
  ])('refuses %s before it writes', async (_, fields, message) => {
    const folder = fresh()
    await fails(saveCheckpoint(folder, 1, { ...contentOf(1), ...(fields as object) }), message)
    await fails(saveCheckpoint(folder, -1, contentOf(1)), /step/)
    await expect(readdir(folder)).rejects.toThrow('ENOENT')
  })

  it('names a path that is a file', async () => {
    await writeFile(join(root, 'file'), '')
    await fails(saveCheckpoint(join(root, 'file'), 1, contentOf(1)), /could not save.*EEXIST.*nothing was changed/)
    await fails(
      saveCheckpoint(join(root, 'file', 'x'), 1, contentOf(1)),
      /a part of the path is a file.*nothing was changed/,
    )
  })

  // Each call of the file system in turn fails; what happens on a real disk is in the tests below.
  it.each(['ENOSPC', 'EACCES', 'EIO'])('leaves one whole checkpoint wherever %s comes', async code => {
    const folder = fresh()
    await saveCheckpoint(folder, 1, contentOf(1))
    const handle = await open(join(folder, 'manifest.json'))
    await handle.close()
    const files = ['write', 'sync'].map(name => [Object.getPrototypeOf(handle), name] as const)
    const paths = ['open', 'writeFile', 'rename', 'mkdir'].map(name => [fs, name] as const)
    let reached = true
    let kept = 0
    let trace: string[] = []
    for (let n = 1; reached; n++) {
      trace = []
      reached = false
      for (const [object, name] of [...files, ...paths]) {
        const original = object[name]
        vi.spyOn(object, name).mockImplementation(function (this: unknown, ...args: unknown[]) {
          if (trace.push(name) !== n) return original.apply(this, args)
          reached = true
          return Promise.reject(Object.assign(new Error(`${code}: injected, ${name}`), { code }))
        })
      }
      syncBuiltinESMExports()
      const error = await saveCheckpoint(folder, 2, contentOf(2)).catch(error => error)
      vi.restoreAllMocks()
      syncBuiltinESMExports()
      if (reached) expect(error).toMatchObject({ name: 'HstuError', code: 'ERR_HSTU_CHECKPOINT' })
      if (reached && code === 'ENOSPC') expect(error.message).toMatch(/^disk is full: could not save/)
      const step = await expectWhole(folder)
      expect(error?.message ?? 'in place').toMatch(step === 2 ? /in place/ : /step 1 is intact|nothing was changed/)
      if (step === 1) kept++
      else await saveCheckpoint(folder, 1, contentOf(1))
      await expectNoLeftovers(folder)
    }
    // All data and their names are on the disk before the rename, and that before the save is reported.
    const data = 'open write write write sync open write write sync writeFile sync writeFile sync'
    expect(trace.join(' ')).toBe(`mkdir ${data} open sync rename open sync`)
    expect(kept).toBe(trace.indexOf('rename') + 1)
  })

  it('finds that another process deleted its files', async () => {
    const folder = fresh()
    const data = async () => {
      for (const name of await readdir(folder)) if (name.startsWith('model')) await rm(join(folder, name))
      return new Float32Array(1)
    }
    const thief = { ...filled(1, 1), data } as never
    const content = { kind: 'x', json: {}, tensors: { model: { a: filled(1) }, z: { thief } } }
    await fails(saveCheckpoint(folder, 1, content), /model-1-.* is gone.*another process.*no checkpoint before/)
    expect(await readdir(folder)).toEqual([])
  })

  it('for a full disk keeps the previous checkpoint, and goes on when there is room', async context => {
    const disk = fresh()
    await mkdir(disk)
    const { status, stderr } = spawnSync('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', disk])
    if (status !== 0) console.warn(`SKIPPED: checkpoints on a full disk, for no tmpfs can be mounted here: ${stderr}`)
    if (status !== 0) return context.skip()
    onTestFinished(() => void spawnSync('umount', [disk]))
    const folder = join(disk, 'run')
    const first = saveCheckpoint(folder, 1, contentOf(1, 200_000))
    await fails(first, /^disk is full: .*no checkpoint before/, { cause: { cause: { code: 'ENOSPC' } } })
    expect(await readdir(folder)).toEqual([])
    await saveCheckpoint(folder, 1, contentOf(1, 30_000))
    for (const size of [60_000, 80_000, 300_000]) {
      const saving = saveCheckpoint(folder, 2, contentOf(2, size))
      await fails(saving, /^disk is full: .*the previous checkpoint of step 1 is intact/)
      expect(await expectWhole(folder)).toBe(1)
      await expectNoLeftovers(folder)
    }
    // What a killed save left must not be what stops the next one.
    await writeFile(join(folder, 'model-2-00112233445566aa.safetensors'), Buffer.alloc(500_000))
    await saveCheckpoint(folder, 3, contentOf(3, 40_000))
    expect(await expectWhole(folder)).toBe(3)
  })

  it('for a kill at whatever moment leaves one whole checkpoint', async () => {
    // The child runs without the test runner, so it gets the library as JavaScript.
    const home = fresh()
    const child = `
      import { saveCheckpoint } from './lib/train/checkpoint.js'
      const contentOf = ${contentOf}, filled = ${filled}
      for (let step = Number(process.argv[3]); ; step++) {
        process.stdout.write('.')
        await saveCheckpoint(process.argv[2], step, contentOf(step, 60_000))
      }`
    await mkdir(join(home, 'lib', 'train'), { recursive: true })
    await writeFile(join(home, 'package.json'), '{"type":"module"}')
    await writeFile(join(home, 'child.mjs'), child)
    const compilerOptions = { target: ts.ScriptTarget.ES2022, module: ts.ModuleKind.ESNext }
    for (const name of ['errors', 'train/safetensors', 'train/checkpoint']) {
      const source = await readFile(new URL(`../../lib/${name}.ts`, import.meta.url), 'utf8')
      await writeFile(join(home, 'lib', `${name}.js`), ts.transpileModule(source, { compilerOptions }).outputText)
    }
    const folder = fresh()
    await saveCheckpoint(folder, 0, contentOf(0))
    const steps = [0]
    let interrupted = 0
    let took = 0
    for (let round = 0; round < 20; round++) {
      const command = [join(home, 'child.mjs'), folder, String(steps.at(-1)! + 1)]
      const running = spawn(process.execPath, command, { stdio: ['ignore', 'pipe', 'inherit'] })
      await once(running.stdout, 'data')
      const begin = performance.now()
      // Every other round kills the first save; the rounds between, a later one, and measure how long a save takes here.
      if (round % 2 === 0) await once(running.stdout, 'data')
      if (round % 2 === 0) took = performance.now() - begin
      await new Promise(resolve => setTimeout(resolve, Math.random() * took))
      running.kill('SIGKILL')
      expect((await once(running, 'close'))[1]).toBe('SIGKILL')
      steps.push(await expectWhole(folder))
      if ((await readdir(folder)).length !== 4) interrupted++
    }
    expect(steps).toEqual([...steps].sort((a, b) => a - b))
    expect(steps.at(-1)).toBeGreaterThan(0)
    expect(interrupted).toBeGreaterThan(0)
    await saveCheckpoint(folder, 1, contentOf(1))
    expect(await expectWhole(folder)).toBe(1)
    await expectNoLeftovers(folder)
  })
})

it('assignTensors names every difference and writes nothing then', () => {
  const [same, shape, dtype, gone, lost] = [2, 2, 2, 2, 1].map(size => Tensor.zeros([size])) as [Tensor, ...Tensor[]]
  const target = { same, shape, dtype, gone, lost } as Record<string, Tensor>
  gone!.dispose()
  const others = { same: filled(1, 2), shape: filled(1, 3), gone: filled(1, 2), extra: filled(1, 4) }
  const source = new Map<string, HostTensor>(Object.entries(others))
  source.set('dtype', { dtype: 'int32', shape: [2], data: new Int32Array(2) })
  const lines = [
    'runs/a: model: the tensors do not fit:',
    "'shape': expected float32[2], found float32[3] of 3 values",
    "'dtype': expected float32[2], found int32[2] of 2 values",
    "'gone': the tensor to write is disposed",
    "'lost': expected float32[1], found none",
    "'extra': expected none, found float32[4]",
  ]
  const error = new HstuError('ERR_HSTU_CHECKPOINT', lines.join('\n  '))
  expect(() => assignTensors(target, source, 'runs/a: model')).toThrow(error)
  expect(same.dataSync()).toEqual(new Float32Array(2))
  for (const tensor of Object.values(target)) tensor.dispose()
})
