import { execFileSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { native } from '#lib/native.js'
import { type Ended, runFixture } from './process.js'

const root = fileURLToPath(new URL('../..', import.meta.url))
const fake = join(root, 'build/fake_cuda')

/** False where an addon was brought without the folder that it was built in. */
export const hasFakeCuda = existsSync(join(root, 'build/CMakeCache.txt'))

/** Builds the addon over the CUDA runtime made of host threads; the first time takes a minute. */
export function buildFakeCuda(): void {
  if (!hasFakeCuda) return
  execFileSync('cmake', ['--build', join(root, 'build'), '--target', 'hstu_fake_cuda'], { stdio: 'pipe' })
  if (!existsSync(join(fake, 'build/Release/hstu.node'))) throw new Error('the fake CUDA addon was not built')
}

/** Runs a fixture over the fake runtime. */
export function onFakeCuda(
  name: string,
  args: readonly string[] = [],
  env: Record<string, string> = {},
): Promise<Ended> {
  return runFixture(name, args, { HSTU_PREBUILD: fake, ...env })
}

const { usable, reason } = native.backend().cuda

/** A test row for each CUDA there is: the fake one, and this host's, which skips loudly where there is none. */
export function onEachCuda(name: string, body: (run: typeof onFakeCuda) => Promise<void>): void {
  if (hasFakeCuda) it(`${name}, fake CUDA`, () => body(onFakeCuda))
  else it.skip(`${name}, fake CUDA: NOT RUN (there is no build folder)`, () => {})
  if (usable) it(`${name}, CUDA`, () => body(runFixture))
  else it.skip(`${name}, CUDA: NOT RUN (${reason})`, () => {})
}
