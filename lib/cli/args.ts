import { type ParseArgsConfig, parseArgs } from 'node:util'
import { commands, type OptionSpec } from './commands.js'

/** What a command is called by, what it takes, and where it is. */
export interface Command {
  /** One word, or two (`data inspect`). */
  name: string
  summary: string
  /** Names of the positional arguments, all of them required. */
  positionals?: readonly string[]
  options: Record<string, OptionSpec>
  example: string
  load: () => Promise<{ run: (args: Args) => Promise<number | undefined> }>
}

/** A command line that makes no sense: exit code 2, with the usage. */
export class UsageError extends Error {
  constructor(
    message: string,
    readonly command: Command | null = null,
  ) {
    super(message)
  }
}

/** The options of a command line, by type. A value that is not of its type is a {@link UsageError}. */
export class Args {
  constructor(
    readonly command: Command,
    /** What was typed, to name a command line that goes on from here. */
    readonly argv: readonly string[],
    readonly positionals: readonly string[],
    private readonly values: Record<string, unknown>,
  ) {}

  private fail(name: string, wanted: string): never {
    throw new UsageError(`--${name} expects ${wanted}, got '${this.values[name]}'`, this.command)
  }

  flag(name: string): boolean {
    return this.values[name] === true
  }

  text(name: string): string | undefined {
    const value = this.values[name] as string | undefined
    const { choices } = this.command.options[name]!
    if (value !== undefined && choices && !choices.includes(value)) this.fail(name, `one of ${choices.join(', ')}`)
    return value
  }

  /** Of an option that the command requires. */
  required(name: string): string {
    return this.text(name)!
  }

  list(name: string): string[] {
    return (this.values[name] as string[] | undefined) ?? []
  }

  number(name: string): number | undefined {
    return this.numeric(name, 'a number', Number.isFinite)
  }

  /** A whole number of at least `least`. */
  integer(name: string, least = 0): number | undefined {
    return this.numeric(name, `a whole number of at least ${least}`, x => Number.isSafeInteger(x) && x >= least)
  }

  private numeric(name: string, wanted: string, valid: (value: number) => boolean): number | undefined {
    const text = this.text(name)
    if (text === undefined) return undefined
    return text.trim() !== '' && valid(Number(text)) ? Number(text) : this.fail(name, wanted)
  }

  /** `key=value` pairs of an option that may be given several times. */
  pairs(name: string): [string, string][] {
    return this.list(name).map(text => {
      const at = text.indexOf('=')
      if (at < 1) throw new UsageError(`--${name} expects key=value, got '${text}'`, this.command)
      return [text.slice(0, at), text.slice(at + 1)]
    })
  }
}

/** Edit distance. */
function distance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j)
  for (let i = 1; i <= a.length; i++) {
    const next = [i]
    for (let j = 1; j <= b.length; j++)
      next.push(Math.min(row[j]! + 1, next[j - 1]! + 1, row[j - 1]! + (a[i - 1] === b[j - 1] ? 0 : 1)))
    row = next
  }
  return row[b.length]!
}

/** " Did you mean X?", or nothing when nothing is near. */
export function suggestion(word: string, known: readonly string[], prefix = ''): string {
  const near = known
    .map(name => ({ name, d: name.startsWith(word) ? 1 : distance(word, name) }))
    .sort((x, y) => x.d - y.d)[0]
  return near && near.d <= Math.max(2, word.length / 3) ? ` Did you mean ${prefix}${near.name}?` : ''
}

/** Finds the command and parses its options. @throws UsageError */
export function parseCommand(argv: readonly string[]): { command: Command | null; args: Args; help: boolean } {
  const [first = '', second = ''] = argv
  if (first === '--help' || first === '-h' || (first === 'help' && !second))
    return { command: null, args: null as never, help: true }
  if (first === 'help') return parseCommand([...argv.slice(1), '--help'])
  const named = (name: string) => commands.find(command => command.name === name)
  const command = named(first) ?? named(`${first} ${second}`)
  if (!command) {
    const group = commands.filter(other => other.name.startsWith(`${first} `))
    const only = group.length === 1 ? group[0]! : null
    if (only && (second === '' || second === '--help' || second === '-h'))
      return { command: only, args: null as never, help: true }
    const asked = second === '--help' || second === '-h'
    if (group.length > 1 && asked) return { command: null, args: null as never, help: true }
    const word = group.length > 0 ? `${first} ${second}`.trim() : first
    throw new UsageError(
      `unknown command '${word}'.${suggestion(
        word,
        commands.map(other => other.name),
      )}`,
      only,
    )
  }
  return parseOptions(command, argv)
}

function parseOptions(command: Command, argv: readonly string[]) {
  const options: NonNullable<ParseArgsConfig['options']> = { help: { type: 'boolean', short: 'h' } }
  for (const [name, spec] of Object.entries(command.options))
    options[name] = { type: spec.value ? 'string' : 'boolean', ...(spec.many ? { multiple: true } : {}) }
  const rest = argv.slice(command.name.split(' ').length)
  try {
    const { values, positionals } = parseArgs({ args: rest, options, allowPositionals: true })
    const args = new Args(command, argv, positionals, values)
    if (values.help) return { command, args, help: true }
    const wanted = command.positionals ?? []
    if (positionals.length < wanted.length) throw new UsageError(`${wanted[positionals.length]} is missing`, command)
    if (positionals.length > wanted.length)
      throw new UsageError(`unexpected argument '${positionals[wanted.length]}'`, command)
    for (const [name, { required }] of Object.entries(command.options))
      if (required && values[name] === undefined) throw new UsageError(`--${name} is required`, command)
    return { command, args, help: false }
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException
    if (!code?.startsWith('ERR_PARSE_ARGS')) throw error
    if (code !== 'ERR_PARSE_ARGS_UNKNOWN_OPTION') throw new UsageError(message.split('\n')[0]!, command)
    const word = /'-{1,2}([^']+)'/.exec(message)?.[1] ?? ''
    const near = suggestion(word, Object.keys(options), '--')
    throw new UsageError(`unknown option '${word.length === 1 ? '-' : '--'}${word}'.${near}`, command)
  }
}
