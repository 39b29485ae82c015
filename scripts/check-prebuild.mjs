// Before a release, and in CI: the tarball of prebuilds/ as a user meets it. It is packed, installed into an empty project without scripts,
// network or cache, and run: on the CPU, and on the GPU where there is one. `--architectures` and `--cpu-only` as given to `npm run prebuild`.
import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, mkdtempSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { imagesWanted, inspect, prebuildOptions } from './addon.mjs'

const LIMIT_MB = 60
const root = join(dirname(fileURLToPath(import.meta.url)), '..')
const { values: options } = parseArgs({ options: prebuildOptions })
const scratch = mkdtempSync(join(tmpdir(), 'hstu-prebuild-'))
process.on('exit', () => rmSync(scratch, { recursive: true, force: true }))

function fail(message) {
  console.error(`check-prebuild: ${message}`)
  process.exit(1)
}

/** A command as a user types it: nothing of npm's own environment, a cache that is empty. */
function run(command, args, cwd, show = false) {
  const clean = Object.entries(process.env).filter(([name]) => !/^(npm_|node_|hstu_)/i.test(name))
  const env = { ...Object.fromEntries(clean), npm_config_cache: join(scratch, 'cache') }
  const { status, signal, stdout, stderr, error } = spawnSync(command, args, {
    cwd,
    env,
    encoding: 'utf8',
    stdio: ['ignore', show ? 'inherit' : 'pipe', show ? 'inherit' : 'pipe'],
  })
  if (error) fail(error.message)
  if (status !== 0) fail(`${command} ${args.join(' ')}: exit code ${signal ?? status}\n${stdout ?? ''}${stderr ?? ''}`)
  return stdout
}

function pack(folder, ...more) {
  const [{ filename, size }] = JSON.parse(
    run('npm', ['pack', '--json', '--pack-destination', scratch, ...more], folder),
  )
  return { file: join(scratch, filename), megabytes: size / 1e6 }
}

const wanted = imagesWanted(options, fail)
const addon = join(root, 'prebuilds/linux-x64/hstu.glibc.node')
if (!existsSync(addon)) fail(`${addon} is missing: npm run prebuild`)
const { needed, highest, images, problems } = inspect(addon, wanted)
const tarball = pack(root)
if (tarball.megabytes > LIMIT_MB)
  problems.push(`makes a tarball of ${tarball.megabytes.toFixed(1)} MB: at most ${LIMIT_MB} MB`)
console.log(`addon    ${(statSync(addon).size / 1e6).toFixed(2)} MB, tarball ${tarball.megabytes.toFixed(2)} MB`)
console.log(
  `needs    ${needed.join(' ')}; ${Object.entries(highest)
    .map(pair => pair.join('_'))
    .join(' ')}`,
)
console.log(`GPU code ${images.join(' ') || 'NONE: a CPU-only addon'}`)
if (problems.length > 0) fail(`${addon}\n  ${problems.join('\n  ')}`)

const project = join(scratch, 'project')
mkdirSync(project)
writeFileSync(join(project, 'package.json'), '{ "private": true }\n')
const loader = pack(join(root, 'node_modules/node-gyp-build'), '--ignore-scripts')
const install = ['install', '--ignore-scripts', '--offline', '--no-audit', '--no-fund']
run('npm', [...install, tarball.file, loader.file], project)

const command = join(project, 'node_modules/.bin/hstu')
const { addon: installed, cuda } = JSON.parse(run(command, ['doctor', '--json'], project))
if (installed.origin !== 'prebuild') fail(`${installed.path} was loaded, which is no prebuild`)
if (cuda.compiled !== wanted.length > 0) fail(`the installed addon says compiled: ${cuda.compiled}`)
const explicit = `import { Tensor } from 'hstu'
try { Tensor.from([1], [1], { device: 'cuda' }).dispose() } catch (error) { console.log(error.code) }`
const refusal = run(process.execPath, ['--input-type=module', '--eval', explicit], project).trim()
if (!cuda.usable && (!cuda.reason || refusal !== cuda.code || !refusal))
  fail(`CUDA is off, with the reason '${cuda.reason}' and code '${cuda.code}', and device 'cuda' threw '${refusal}'`)
console.log(`CUDA     ${cuda.usable ? cuda.devices.map(({ name }) => name).join(', ') : `off: ${cuda.reason}`}`)
run(command, ['selftest', '--device', 'cpu'], project, true)
if (cuda.usable) run(command, ['selftest', '--device', 'cuda'], project, true)
else if (cuda.compiled && existsSync('/proc/driver/nvidia/version')) fail('a driver is here, and CUDA is off')
console.log(`check-prebuild: holds${cuda.usable ? '' : '; NO GPU TEST RAN'}`)
