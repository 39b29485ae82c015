import { readFileSync } from 'node:fs'
import { basename, dirname, join, relative, sep } from 'node:path'
import { fileURLToPath } from 'node:url'

/** Folder of the package, without loading the addon. */
export const packageFolder = join(dirname(fileURLToPath(import.meta.url)), '../..')

interface PackageJson {
  version: string
  peerDependencies?: Record<string, string>
}

export function packageJson(): PackageJson {
  return JSON.parse(readFileSync(join(packageFolder, 'package.json'), 'utf8')) as PackageJson
}

export function packageVersion(): string {
  return packageJson().version
}

/** One word of a POSIX shell. */
function shellWord(word: string): string {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`
}

/** A command line that runs this program again in this folder, as the user called it. */
export function commandLine(args: readonly string[]): string {
  const script = process.argv[1] ?? 'hstu'
  const installed = basename(script) === 'hstu' // the link that npm makes
  const local = script.includes(`${sep}node_modules${sep}.bin${sep}`) ? ['npx', 'hstu'] : ['hstu']
  const program = installed ? local : ['node', relative(process.cwd(), script)]
  return [...program, ...args].map(shellWord).join(' ')
}

/**
 * Imports a package that the user may or may not have installed.
 * @returns null when it is not there; an error inside it is thrown.
 */
export async function optional<T>(name: string, load: () => Promise<T>): Promise<T | null> {
  try {
    return await load()
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException
    if (code === 'ERR_MODULE_NOT_FOUND' && message.includes(`'${name}'`)) return null
    throw error
  }
}
