import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { Random } from '#lib/random.js'

const root = fileURLToPath(new URL('../..', import.meta.url))
export const cli = join(root, 'dist/cli.js')

/** The program under test is the built one; `npm test` builds it before. */
export function buildIfMissing(): void {
  if (!existsSync(cli)) execFileSync(process.execPath, [join(root, 'scripts/build.mjs'), 'ts'], { cwd: root })
}

export interface Result {
  code: number | null
  signal: string | null
  stdout: string
  stderr: string
}

/** Runs the command line; `watch` sees stderr as it grows, and may send signals. */
export function hstu(
  args: readonly string[],
  {
    cwd,
    env,
    watch,
  }: { cwd?: string; env?: NodeJS.ProcessEnv; watch?: (stderr: string, child: ChildProcess) => void } = {},
): Promise<Result> {
  return new Promise((resolve, reject) => {
    const child = spawn(process.execPath, [cli, ...args], { cwd, env: { ...process.env, ...env } })
    const text = { stdout: '', stderr: '' }
    child.stdout.setEncoding('utf8').on('data', chunk => {
      text.stdout += chunk
    })
    child.stderr.setEncoding('utf8').on('data', chunk => {
      text.stderr += chunk
      watch?.(text.stderr, child)
    })
    child.on('error', reject)
    child.on('close', (code, signal) => resolve({ code, signal, ...text }))
  })
}

/** A folder that is gone after the tests of the file. */
export function temporaryFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), 'hstu-cli-'))
  afterAll(() => rmSync(folder, { recursive: true, force: true }))
  return folder
}

/** A small RecBole file with its titles: `users` users who walk over `items` items in steps of one or two, in time. */
export function writeActions(folder: string, users = 60, items = 40): { data: string; titles: string } {
  const random = new Random('actions')
  const rows = ['user_id:token\titem_id:token\trating:float\ttimestamp:float']
  for (let u = 0; u < users; u++) {
    let item = random.int(items)
    const length = 6 + random.int(16)
    for (let t = 0; t < length; t++) {
      item = (item + 1 + random.int(2)) % items
      rows.push(`u${u}\ti${item}\t${1 + random.int(5)}\t${1_600_000_000 + 1000 * u + 60 * t}`)
    }
  }
  rows.push('short\ti1\t3\t1600000000')
  const data = join(folder, 'tiny.inter')
  const titles = join(folder, 'tiny.item')
  writeFileSync(data, `${rows.join('\n')}\n`)
  const names = Array.from({ length: items }, (_, i) => `i${i}\tTitle ${i}`)
  writeFileSync(titles, `item_id:token\tmovie_title:token_seq\n${names.join('\n')}\n`)
  return { data, titles }
}
