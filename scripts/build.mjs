// npm run build:all: the addon, the types made from its signatures, dist/ (ESM, CommonJS, selftest). What is up to date is not made again.
// `native` or `ts` after the script's name builds that half only; `cuda` builds both with the CUDA backend, or fails.
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

const root = join(dirname(fileURLToPath(import.meta.url)), '..')
const dist = join(root, 'dist')
const require = createRequire(import.meta.url)

function fail(message) {
  console.error(`hstu: ${message}`)
  process.exit(1)
}

function run(script, args, onFailure = () => {}) {
  const env = { CMAKE_BUILD_PARALLEL_LEVEL: String(availableParallelism()), ...process.env }
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

function buildNative(cuda) {
  checkTools()
  const cmakeJs = require.resolve('cmake-js/bin/cmake-js')
  const build = join(root, 'build')
  // A configure step that failed leaves a cache, for which cmake-js would not configure again, or only as it failed.
  const forget = () => rmSync(join(build, 'CMakeCache.txt'), { force: true })
  if (!['build.ninja', 'Makefile'].some(file => existsSync(join(build, file)))) forget()
  if (cuda) run(cmakeJs, ['configure', '--CDHSTU_CUDA=ON', '--log-level', 'warn'], forget)
  run(cmakeJs, ['build', '--log-level', 'warn'])
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

const parts = process.argv.slice(2)
const cuda = parts.includes('cuda')
if (parts.length === 0 || cuda || parts.includes('native')) buildNative(cuda)
if (parts.length === 0 || cuda || parts.includes('ts')) buildTypeScript()
