import { spawn } from 'node:child_process'
import { once } from 'node:events'
import {
  copyFileSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { join } from 'node:path'
import { beforeAll, describe, expect, it } from 'vitest'
import { Random } from '#lib/random.js'
import { type BundleManifest, makeRanker, type RankerManifest, readBundle, writeBundle } from '#lib/serve/bundle.js'
import { trainingLogits } from '#lib/serve/golden.js'
import { memory } from '#lib/tensor.js'
import { loadCheckpoint, saveCheckpoint } from '#lib/train/checkpoint.js'
import { buildIfMissing, temporaryFolder } from '../cli/process.js'
import { schema, wireOf, writeTestBundle } from './requests.js'

const folder = temporaryFolder()
const whole = join(folder, 'whole')
beforeAll(async () => {
  buildIfMissing()
  await writeTestBundle(whole)
})
const refusal = (message: RegExp) =>
  expect.objectContaining({ code: 'ERR_HSTU_CHECKPOINT', message: expect.stringMatching(message) })

/** A copy of the bundle, to be damaged. */
function copy(name: string): string {
  const to = join(folder, name)
  rmSync(to, { recursive: true, force: true })
  mkdirSync(to)
  for (const file of readdirSync(whole)) copyFileSync(join(whole, file), join(to, file))
  return to
}

describe('a bundle', () => {
  it('gives its golden request the logits that it says', async () => {
    const before = memory()
    const bundle = await readBundle(whole)
    const { golden, model } = bundle.manifest as RankerManifest
    expect(model).toBe('test-1')
    const parts = makeRanker(bundle as never)
    const encoder = { config: parts.model.config, vocabularies: bundle.vocabularies, unknownIds: 'error' as const }
    const logits = trainingLogits(parts, [wireOf(golden.request)], encoder, schema)
    expect(Array.from(logits)).toEqual(golden.logits)
    parts.model.dispose()
    expect(memory()).toEqual(before)
  })

  it('is refused with any byte flipped, cut short, or with a file missing, and nothing of it is loaded', async () => {
    const before = memory()
    const random = new Random('flips')
    for (const file of readdirSync(whole)) {
      const bytes = readFileSync(join(whole, file))
      const at = [0, 7, 8, bytes.length - 2, ...Array.from({ length: 60 }, () => random.int(bytes.length - 1))]
      for (const position of at) {
        const damaged = copy('damaged')
        const flipped = Buffer.from(bytes)
        flipped[position]! ^= 1 << random.int(8)
        writeFileSync(join(damaged, file), flipped)
        await expect(readBundle(damaged), `${file}, byte ${position}`).rejects.toThrow(refusal(/damaged/))
      }
      for (const length of [0, 1, 8, bytes.length >> 1, bytes.length - 2]) {
        const damaged = copy('damaged')
        truncateSync(join(damaged, file), length)
        await expect(readBundle(damaged), `${file} of ${length} bytes`).rejects.toThrow(refusal(/damaged/))
      }
      const damaged = copy('damaged')
      rmSync(join(damaged, file))
      await expect(readBundle(damaged), `without ${file}`).rejects.toThrow(
        refusal(/no such file|expected a checkpoint/),
      )
    }
    expect(memory()).toEqual(before)
  })

  it('names the field that is not what it has to be', async () => {
    const { json, tensors, files } = await loadCheckpoint(whole)
    const groups = { model: Object.fromEntries(tensors.model!) }
    const wrong = join(folder, 'wrong')
    const refuse = async (change: Record<string, unknown>, message: RegExp, more: Record<string, string> = {}) => {
      await saveCheckpoint(wrong, 0, {
        kind: 'bundle',
        tensors: groups,
        json: { ...json, ...change },
        files: { ...files, ...more },
      })
      const load = async () => {
        const { model } = makeRanker((await readBundle(wrong)) as never)
        model.dispose()
      }
      await expect(load()).rejects.toThrow(refusal(message))
    }
    const manifest = json as unknown as BundleManifest
    await refuse({ bundle: 1 }, /manifest\.json: json\.bundle: expected version 2, found 1/)
    await refuse({ type: 'reader' }, /json\.type: expected 'ranker' or 'retriever', found "reader"/)
    await refuse({ precision: 'int4' }, /json\.precision: expected one of float32, bf16, found "int4"/)
    await refuse({ schema: { ...schema, actions: ['LIKE'] } }, /json\.schema\.actions: expected 2 names/)
    await refuse({ golden: { ...manifest.golden, logits: [1] } }, /json\.golden\.logits: expected 16 numbers/)
    await refuse({ architecture: { ...manifest.architecture, heads: 0 } }, /json\.architecture: heads must be/)
    await refuse({ architecture: { ...manifest.architecture, dim: 16 } }, /model: the tensors do not fit/)
    const model = { ...manifest.tensors.model, actions: { dtype: 'float32', shape: [2, 4] } }
    await refuse({ tensors: { model } }, /json\.tensors\.model\.actions: expected .*\[2,3\].*found .*\[2,4\]/)
    await refuse({}, /vocabulary-2\.json: expected 60 ids of 'item', found 1/, { 'vocabulary-2.json': '["1"]' })
    await refuse({}, /vocabulary 'country', entry 1: "c1" is no new text/, { 'vocabulary-1.json': '["c1", "c1"]' })
    await refuse({}, /vocabulary-1\.json: expected a JSON list of ids/, { 'vocabulary-1.json': '["c1"' })
    await saveCheckpoint(wrong, 0, { kind: 'model', tensors: groups, json, files })
    await expect(readBundle(wrong)).rejects.toThrow(refusal(/kind: expected 'bundle' \(hstu export makes one/))
  })

  it('replaces no folder that is something else', async () => {
    const other = copy('other')
    writeFileSync(join(other, 'manifest.json'), '{"format":"something"}')
    await expect(writeTestBundle(other)).rejects.toThrow(refusal(/expected a manifest of format/))
  })

  it('is the old one, whole, when the export of a new one is killed', async () => {
    const target = copy('target')
    // Writes bundle after bundle; the name of each stands on stdout when it is begun.
    const child = `
      import { readBundle, writeBundle } from ${JSON.stringify(new URL('../../dist/serve/bundle.js', import.meta.url).href)}
      const { manifest, tensors, vocabularies } = await readBundle(process.argv[1])
      const { bundle, tensors: _, ...rest } = manifest
      const content = { tensors: { model: Object.fromEntries(tensors.model) }, vocabularies: vocabularies.map(v => v.ids) }
      for (let n = 0; ; n++) {
        process.stdout.write('.')
        await writeBundle(process.argv[2], { ...rest, model: process.argv[3] + n }, content)
      }`
    let interrupted = 0
    const models: string[] = []
    const files = readdirSync(target).length
    for (let round = 0; round < 12; round++) {
      const running = spawn(process.execPath, ['--input-type=module', '-e', child, whole, target, `${round}-`], {
        stdio: ['ignore', 'pipe', 'inherit'],
      })
      await once(running.stdout, 'data')
      await new Promise(resolve => setTimeout(resolve, Math.random() * 20))
      running.kill('SIGKILL')
      expect((await once(running, 'close'))[1]).toBe('SIGKILL')
      models.push((await readBundle(target)).manifest.model)
      if (readdirSync(target).length !== files) interrupted++
    }
    expect(models.every((model, round) => model === 'test-1' || Number(model.split('-')[0]) <= round)).toBe(true)
    expect(interrupted).toBeGreaterThan(0)
    const { manifest, tensors, vocabularies } = await readBundle(target)
    const content = {
      tensors: { model: Object.fromEntries(tensors.model!) },
      vocabularies: vocabularies.map(v => v!.ids),
    }
    await writeBundle(target, { ...(manifest as RankerManifest), model: 'last' }, content)
    expect((await readBundle(target)).manifest.model).toBe('last')
    expect(statSync(join(target, 'manifest.json')).size).toBeGreaterThan(0)
    expect(readdirSync(target).length).toBe(files)
  })
})
