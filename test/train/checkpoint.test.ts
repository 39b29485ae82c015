import { mkdir, readdir, readFile, rm, truncate, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { beforeEach, describe, expect, it } from 'vitest'
import { HstuError } from '#lib/errors.js'
import { memory, Tensor } from '#lib/tensor.js'
import { assignTensors, loadCheckpoint, saveCheckpoint } from '#lib/train/checkpoint.js'
import type { HostTensor } from '#lib/train/safetensors.js'
import { contentOf, expectNoLeftovers, expectWhole, fails, filled, fresh, manifestOf } from './checkpoints.js'

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
