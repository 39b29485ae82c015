import { readFile, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { HstuError } from '../../errors.js'
import type { PrepareCounts, VocabularySizes } from './entries.js'
import type { RequestSchema } from './schema.js'

export const MANIFEST = 'manifest.json'
const FORMAT = 'hstu-requests'
const VERSION = 1

/** One Parquet file of request records. */
export interface ShardFile {
  file: string
  bytes: number
  /** Number of its first request. */
  first: number
  requests: number
}

/** `manifest.json` of a prepared folder: what its shards hold. */
export interface RequestManifest {
  format: string
  version: number
  name: string
  schema: RequestSchema
  /** Default tasks; see `parseTask`. */
  tasks: readonly string[]
  maxHistory: number
  sizes: VocabularySizes
  counts: PrepareCounts
  requests: number
  candidates: number
  shards: ShardFile[]
}

export const newManifest = (content: Omit<RequestManifest, 'format' | 'version'>): RequestManifest => ({
  ...{ format: FORMAT, version: VERSION },
  ...content,
})

/**
 * The manifest of a prepared folder; its shards are there, and of the size they were written with.
 * @throws HstuError ERR_HSTU_DATA for a folder that is none, another version, a shard that is missing or cut off.
 */
export async function readManifest(folder: string): Promise<RequestManifest> {
  const fail = (message: string, cause?: unknown) =>
    new HstuError('ERR_HSTU_DATA', `${folder}: ${message}`, cause === undefined ? undefined : { cause })
  let manifest: RequestManifest
  try {
    manifest = JSON.parse(await readFile(join(folder, MANIFEST), 'utf8')) as RequestManifest
  } catch (cause) {
    throw fail(`expected a folder of request records with a ${MANIFEST}, as hstu data prepare writes it`, cause)
  }
  if (manifest?.format !== FORMAT) throw fail(`${MANIFEST} is not of the format ${FORMAT}`)
  if (manifest.version !== VERSION)
    throw fail(`version ${manifest.version} of ${FORMAT}; this program reads ${VERSION}`)
  const { schema, shards, tasks } = manifest
  const lists = [schema?.actions, schema?.values, schema?.contextual, schema?.series, shards, tasks]
  if (!lists.every(Array.isArray)) throw fail(`${MANIFEST} lacks schema, tasks or shards`)
  let next = 0
  for (const { file, bytes, first, requests } of shards) {
    const size = await stat(join(folder, file)).then(
      info => info.size,
      () => null,
    )
    if (size === null) throw fail(`shard ${file} is missing`)
    if (size !== bytes) throw fail(`shard ${file} has ${size} bytes of ${bytes}: it was cut off or changed`)
    if (first !== next) throw fail(`shard ${file} begins with request ${first}, expected ${next}`)
    next += requests
  }
  if (next !== manifest.requests) throw fail(`the shards have ${next} requests, ${MANIFEST} says ${manifest.requests}`)
  return manifest
}
