import { existsSync, readdirSync } from 'node:fs'
import { basename, join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { HstuError } from '../errors.js'
import type { Args } from './args.js'
import { tensorOptions } from './device.js'
import { EXIT_INTERRUPTED, interruptible } from './interrupt.js'
import { counted, print, printJson } from './output.js'
import { packageFolder } from './package.js'
import { Progress } from './progress.js'

/** What the harness of the op tests registers; see test/harness.ts. */
interface Check {
  op: string
  name: string
  device: 'cpu' | 'cuda'
  run: () => void | Promise<void>
}

interface Failure {
  op: string
  name: string
  message: string
}

async function loadChecks(): Promise<Check[]> {
  const folder = join(packageFolder, 'dist/selftest')
  const files = existsSync(folder) ? readdirSync(folder, { recursive: true, encoding: 'utf8' }).sort() : []
  const tests = files.filter(file => file.endsWith('.test.js'))
  const harness = files.find(file => basename(file) === 'harness.js')
  if (!harness || tests.length === 0)
    throw new HstuError('ERR_HSTU_INVALID_ARGUMENT', `${folder} holds no checks; in a clone: npm run build:all`)
  const load = (file: string) => import(pathToFileURL(join(folder, file)).href)
  for (const test of tests) await load(test)
  return ((await load(harness)) as { checks: Check[] }).checks
}

export function run(args: Args): Promise<number | undefined> {
  return interruptible(async signal => {
    const device = tensorOptions(args.text('device') ?? 'cpu').device === 'cpu' ? 'cpu' : 'cuda'
    const filter = (args.text('filter') ?? '').toLowerCase()
    const all = await loadChecks()
    const checks = all.filter(check => check.device === device && check.op.toLowerCase().includes(filter))
    if (checks.length === 0)
      throw new HstuError(
        'ERR_HSTU_INVALID_ARGUMENT',
        `no op matches '${filter}'. Ops: ${[...new Set(all.map(({ op }) => op))].join(', ')}`,
      )
    const start = performance.now()
    const failures: Failure[] = []
    const progress = new Progress('self-test')
    let done = 0
    for (const { op, name, run: check } of checks) {
      if (signal.aborted) break
      progress.update(done, checks.length, op)
      try {
        await check()
      } catch (error) {
        failures.push({ op, name, message: error instanceof Error ? error.message : String(error) })
        progress.log(`FAILED  ${op}: ${name}\n  ${failures.at(-1)!.message.split('\n').join('\n  ')}`)
      }
      done++
      await new Promise(resolve => setImmediate(resolve)) // lets Ctrl-C through
    }
    progress.clear()
    const seconds = (performance.now() - start) / 1e3
    const ops = new Set(checks.map(({ op }) => op)).size
    if (args.flag('json'))
      printJson({
        ok: failures.length === 0 && done === checks.length,
        device,
        ops,
        checks: done,
        failures,
        seconds,
      })
    else
      print(
        `${counted(done, 'check')} of ${counted(ops, 'op')} on ${device} in ${seconds.toFixed(1)} s: ` +
          (failures.length === 0 ? 'all hold' : `${failures.length} FAILED`) +
          (done < checks.length ? `; stopped, ${checks.length - done} not run` : ''),
      )
    if (done < checks.length) return EXIT_INTERRUPTED
    return failures.length === 0 ? 0 : 1
  })
}
