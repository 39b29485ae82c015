#!/usr/bin/env node
import { parseCommand, UsageError } from './cli/args.js'
import { commandHelp, mainHelp, usageOf } from './cli/help.js'
import { packageVersion } from './cli/package.js'
import { HstuError } from './errors.js'

/** Runs one command line and returns the exit code. */
async function main(argv: string[]): Promise<number> {
  if (argv.length === 0) {
    process.stderr.write(mainHelp())
    return 2
  }
  if (argv[0] === '--version' || argv[0] === '-v') {
    process.stdout.write(`${packageVersion()}\n`)
    return 0
  }
  const { command, args, help } = parseCommand(argv)
  if (help || !command) {
    process.stdout.write(command ? commandHelp(command) : mainHelp())
    return 0
  }
  const { run } = await command.load()
  return (await run(args)) ?? 0
}

function report(error: unknown): number {
  const debug = process.env.HSTU_DEBUG === '1'
  if (error instanceof UsageError) {
    process.stderr.write(`error: ${error.message}\n${usageOf(error.command)}`)
    return 2
  }
  if (error instanceof HstuError) {
    process.stderr.write(`error: ${error.message} (${error.code})\n`)
    if (debug) process.stderr.write(`${error.stack}\n${error.cause ? `caused by ${String(error.cause)}\n` : ''}`)
    return 1
  }
  // What the system refuses (no space, no permission) needs no stack; anything else is a defect of this program.
  const system = error as NodeJS.ErrnoException
  if (system?.syscall && system.code && !debug) process.stderr.write(`error: ${system.message}\n`)
  else process.stderr.write(`error: ${error instanceof Error ? error.stack : String(error)}\n`)
  return 1
}

// `hstu ... | head`: whoever reads has read enough.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code === 'EPIPE') process.exit(0)
  throw error
})
// Progress that nobody sees any more does not end a training run.
process.stderr.on('error', () => {})

main(process.argv.slice(2)).then(
  code => {
    process.exitCode = code
  },
  error => {
    process.exitCode = report(error)
  },
)
