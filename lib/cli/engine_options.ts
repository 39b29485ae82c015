import type { RankerOptions } from '../serve/ranker.js'
import type { Device } from '../tensor.js'
import type { Args } from './args.js'
import type { OptionSpec } from './commands.js'

/** Options of the commands that load an engine. */
export const engineSpecs: Record<string, OptionSpec> = {
  bundle: { value: 'FOLDER', text: 'from hstu export', required: true },
  'max-history': { value: 'N', text: 'rows kept of a history; default as in training' },
  'cache-bytes': { value: 'N', text: 'of the cache of histories; default 256 MiB on the CPU, 2 GiB on CUDA' },
  microbatch: { value: 'N', text: 'candidates of a request computed at once; default 1024, on CUDA 4096' },
}

export function engineOptions(args: Args): RankerOptions {
  const numbers = {
    ...{ maxHistory: args.integer('max-history', 1), cacheBytes: args.integer('cache-bytes', 1) },
    microbatch: args.integer('microbatch', 1),
  }
  const given = Object.entries(numbers).filter(([, value]) => value !== undefined)
  return { device: (args.text('device') ?? 'auto') as 'auto' | Device, ...Object.fromEntries(given) }
}
