// npm run build:all: the addon, the types made from its signatures, dist/ (ESM, CommonJS, selftest). What is up to date is not made again.
// `native` or `ts` after the script's name builds that half only; `cuda` builds both with the CUDA backend, or fails.
// `prebuild` makes prebuilds/ as published, in a build folder of its own: CPU and CUDA for `--architectures`, or `--cpu-only` when asked.
import { spawnSync } from 'node:child_process'
import {
  accessSync,
  chmodSync,
  constants,
  cpSync,
  existsSync,
  mkdirSync,
  readdirSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { createRequire } from 'node:module'
import { availableParallelism } from 'node:os'
import { delimiter, dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { imagesWanted, inspect, prebuildOptions } from './addon.mjs'

const root = join(dirname(fileURLToPath(import.meta.url)), '..')
const dist = join(root, 'dist')
const require = createRequire(import.meta.url)

function fail(message) {
  console.error(`hstu: ${message}`)
  process.exit(1)
}

function run(script, args, { onFailure = () => {}, more = {} } = {}) {
  const env = { CMAKE_BUILD_PARALLEL_LEVEL: String(availableParallelism()), ...process.env, ...more }
  const { status, error } = spawnSync(process.execPath, [script, ...args], { cwd: root, stdio: 'inherit', env })
  if (status === 0) return
  onFailure()
  if (error) fail(error.message)
  process.exit(status ?? 1)
}

function onPath(command) {
  return (process.env.PATH ?? '').split(delimiter).some(folder => {
    try {
      accessSync(join(folder, command), constants.X_OK)
      return true
    } catch {
      return false
    }
  })
}

/** npm cannot bring these: say which are missing before CMake says it in many words. */
function checkTools() {
  const missing = []
  if (!process.env.CXX && !['c++', 'g++', 'clang++'].some(onPath)) missing.push('a C++20 compiler (GCC 12 or later)')
  if (!onPath('cmake')) missing.push('CMake (3.18 or later)')
  if (!['ninja', 'make'].some(onPath)) missing.push('make (or ninja)')
  if (missing.length > 0)
    fail(
      `the native addon is built from source here, and this host lacks ${missing.join(' and ')}.\n` +
        '  Debian, Ubuntu:  sudo apt-get install -y g++ cmake make\n' +
        '  Fedora, RHEL:    sudo dnf install -y gcc-c++ cmake make',
    )
}

/** Builds the addon into `folder`/Release. `defines`, CMake's, are set anew; without them the folder keeps what it was configured for. */
function buildNative(folder, defines = []) {
  checkTools()
  const cmakeJs = require.resolve('cmake-js/bin/cmake-js')
  const options = ['--out', folder, '--log-level', 'warn']
  // A configure step that failed leaves a cache, for which cmake-js would not configure again, or only as it failed.
  const forget = () => rmSync(join(folder, 'CMakeCache.txt'), { force: true })
  if (!['build.ninja', 'Makefile'].some(file => existsSync(join(folder, file)))) forget()
  if (defines.length > 0)
    run(cmakeJs, ['configure', ...defines.map(text => `--CD${text}`), ...options], { onFailure: forget })
  run(cmakeJs, ['build', ...options])
}

/** The CommonJS entry is the ES module itself, so that both see one addon, one Tensor class and one tape. */
function writeCommonJs() {
  const cjs = join(dist, 'cjs')
  rmSync(cjs, { recursive: true, force: true })
  mkdirSync(cjs)
  for (const entry of readdirSync(dist, { recursive: true }))
    if (entry.endsWith('.d.ts')) cpSync(join(dist, entry), join(cjs, entry))
  writeFileSync(join(cjs, 'package.json'), '{ "type": "commonjs" }\n')
  writeFileSync(join(cjs, 'index.js'), "module.exports = require('../index.js')\n")
}

/** What is left in dist/ of sources that are gone would be shipped. */
function removeOrphans() {
  if (!existsSync(dist)) return
  for (const entry of readdirSync(dist, { recursive: true })) {
    const source = entry.replace(/(\.d)?\.[jt]s$/, '.ts')
    if (source === entry || entry.startsWith('cjs')) continue
    const path = entry.startsWith('selftest') ? join('test', source.slice('selftest'.length)) : join('lib', source)
    if (!existsSync(join(root, path))) rmSync(join(dist, entry))
  }
}

function buildTypeScript() {
  removeOrphans()
  run(join(root, 'scripts/generate-types.mjs'), [])
  run(require.resolve('typescript/bin/tsc'), ['--build', 'scripts/tsconfig.selftest.json'])
  writeCommonJs()
  const cli = join(dist, 'cli.js')
  if (existsSync(cli)) chmodSync(cli, 0o755)
}

/** The addon that users install, whatever this tree was configured for: built apart, stripped, named, and read again. */
function prebuild(options) {
  const wanted = imagesWanted(options, fail)
  const folder = join(root, 'build/prebuild')
  rmSync(join(root, 'prebuilds'), { recursive: true, force: true })
  const cuda = ['HSTU_CUDA=ON', `HSTU_CUDA_ARCHITECTURES=${options.architectures.replaceAll(',', ';')}`]
  buildNative(join(folder, 'build'), options['cpu-only'] ? ['HSTU_CUDA=OFF'] : cuda)
  // prebuildify would call node-gyp: the addon is built, so it calls `true`.
  const name = ['--napi', '--strip', '--tag-libc', '--name', 'hstu', '--cwd', folder, '--out', root]
  run(require.resolve('prebuildify/bin.js'), name, { more: { PREBUILD_NODE_GYP: 'true' } })
  const file = 'prebuilds/linux-x64/hstu.glibc.node'
  const { problems } = inspect(join(root, file), wanted)
  if (problems.length > 0) fail(`${file}\n  ${problems.join('\n  ')}`)
  console.log(`hstu: ${file}: ${wanted.length > 0 ? `CPU, and CUDA for ${wanted.join(', ')}` : 'CPU ONLY, as asked'}`)
}

const { values, positionals: parts } = parseArgs({ options: prebuildOptions, allowPositionals: true })
if (parts.includes('prebuild')) {
  prebuild(values)
  process.env.PREBUILDS_ONLY = '1' // the types are made from it
} else if (parts.includes('cuda')) buildNative(join(root, 'build'), ['HSTU_CUDA=ON'])
else if (!parts.includes('ts')) buildNative(join(root, 'build'))
if (!parts.includes('native')) buildTypeScript()
