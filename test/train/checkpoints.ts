import { mkdtempSync } from 'node:fs'
import { readdir, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, expect } from 'vitest'
import { type CheckpointContent, loadCheckpoint } from '#lib/train/checkpoint.js'
import type { HostTensor } from '#lib/train/safetensors.js'

export const root = mkdtempSync(join(tmpdir(), 'hstu-checkpoint-'))
let count = 0
export const fresh = () => join(root, `c${count++}`)
afterAll(() => rm(root, { recursive: true, force: true }))

export const filled = (value: number, size = 1000): HostTensor => {
  return { dtype: 'float32', shape: [size], data: new Float32Array(size).fill(value) }
}
/** Content whose every part tells the step; `size` values in each of three tensors. */
export function contentOf(step: number, size?: number): CheckpointContent {
  const tensors = { model: { a: filled(step, size), b: filled(step, size) }, optimizer: { m: filled(step, size) } }
  return { kind: 'training', tensors, json: { state: { step } }, files: { 'vocabulary.json': `["${step}"]` } }
}
/** Loads, and checks that all parts are of one step; gives the step. */
export async function expectWhole(folder: string): Promise<number> {
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
export const manifestOf = async (folder: string) => JSON.parse(await readFile(join(folder, 'manifest.json'), 'utf8'))
export async function expectNoLeftovers(folder: string): Promise<void> {
  const { files, texts } = await manifestOf(folder)
  const named = [files, texts].flatMap(x => Object.values<{ file: string }>(x)).map(({ file }) => file)
  expect((await readdir(folder)).sort()).toEqual([...named, 'manifest.json'].sort())
}
export const fails = (promise: Promise<unknown>, pattern: RegExp | string, more: object = {}) => {
  const message = expect.stringMatching(pattern)
  return expect(promise).rejects.toMatchObject({ code: 'ERR_HSTU_CHECKPOINT', message, ...more })
}
