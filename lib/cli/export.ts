import { exportBundle } from '../serve/export.js'
import type { Args } from './args.js'
import { print, printJson } from './output.js'
import { provenance } from './report.js'

export async function run(args: Args): Promise<undefined> {
  const requests = args.text('requests')
  const made = await exportBundle(args.required('checkpoint'), args.required('out'), requests ? { requests } : {})
  if (args.flag('json')) printJson({ ...provenance('export'), ...made })
  else print(`${made.folder}: ${made.type} ${made.model}`)
}
