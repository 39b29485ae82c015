import { spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import fs, { mkdir, open, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { syncBuiltinESMExports } from 'node:module'
import { join } from 'node:path'
import ts from 'typescript'
import { describe, expect, it, onTestFinished, vi } from 'vitest'
import { saveCheckpoint } from '#lib/train/checkpoint.js'
import { contentOf, expectNoLeftovers, expectWhole, fails, filled, fresh, root } from './checkpoints.js'

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
