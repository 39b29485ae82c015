import type { Command } from './args.js'
import { commands } from './commands.js'
import { packageVersion } from './package.js'

const columns = (rows: readonly (readonly [string, string])[]): string => {
  const width = Math.max(...rows.map(([left]) => left.length))
  return rows.map(([left, right]) => `  ${left.padEnd(width)}  ${right}\n`).join('')
}

export function mainHelp(): string {
  return (
    `hstu ${packageVersion()}: generative recommenders (HSTU) for Node\n\nUsage: hstu <command> [options]\n\n` +
    columns(commands.map(command => [command.name, command.summary])) +
    '\nhstu <command> --help lists the options of a command; hstu --version gives the version.\n' +
    'Results go to stdout, progress to stderr. HSTU_NUM_THREADS sets the threads, HSTU_DEBUG=1 shows stacks.\n'
  )
}

function synopsis(command: Command): string {
  const required = Object.entries(command.options).filter(([, spec]) => spec.required)
  const words = [
    ...(command.positionals ?? []),
    ...required.map(([name, spec]) => `--${name} ${spec.value}`),
    Object.keys(command.options).length > required.length ? '[options]' : '',
  ]
  return `Usage: hstu ${[command.name, ...words].filter(Boolean).join(' ')}\n`
}

/** What an error about the command line ends with. */
export function usageOf(command: Command | null): string {
  return command
    ? `${synopsis(command)}See hstu ${command.name} --help\n`
    : `Usage: hstu <command> [options]\nCommands: ${commands.map(({ name }) => name).join(', ')}\n`
}

export function commandHelp(command: Command): string {
  const options = Object.entries(command.options).map(([name, spec]) => {
    const choices = spec.choices ? ` (${spec.choices.join(', ')})` : ''
    return [`--${name}${spec.value ? ` ${spec.value}` : ''}`, spec.text + choices] as const
  })
  const all = [...options, ['-h, --help', 'this text'] as const]
  return `${synopsis(command)}\n${command.summary}\n\n${columns(all)}\nExample:\n  ${command.example}\n`
}
