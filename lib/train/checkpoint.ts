import { createHash, randomBytes } from 'node:crypto'
import { mkdir, open, readdir, readFile, rename, rm, stat, writeFile } from 'node:fs/promises'
import { dirname, join, parse, resolve } from 'node:path'
import { HstuError } from '../errors.js'
import type { Tensor } from '../tensor.js'
import { type HostTensor, readSafetensors, writeSafetensors } from './safetensors.js'

/** What a checkpoint holds. */
export interface CheckpointContent {
  /** What it is for: 'training', 'model', ... */
  kind: string
  /** One safetensors file a group: group ('model', 'optimizer', ...) -> name -> tensor. */
  tensors: Record<string, Record<string, Tensor | HostTensor>>
  /** Config, trainer state: small, plain JSON; stands in the manifest. Numbers must be finite. */
  json: Record<string, unknown>
  /** Further text files, by name: 'vocabulary.json' -> content. */
  files?: Record<string, string>
}

/** A checkpoint as read back. */
export interface LoadedCheckpoint extends Pick<CheckpointContent, 'kind' | 'json'> {
  step: number
  tensors: Record<string, Map<string, HostTensor>>
  files: Record<string, string>
}

type StoredFile = { file: string; bytes: number; sha256: string }

interface Manifest {
  format: string
  version: number
  kind: string
  step: number
  created: string
  /** Version of this package that wrote it. */
  library: string
  /** Tensor groups, and text files. */
  files: Record<string, StoredFile>
  texts: Record<string, StoredFile>
  json: Record<string, unknown>
  /** Of the JSON text of all the fields above, without white space. */
  sha256: string
}

const FORMAT = 'hstu-checkpoint'
const VERSION = 1
const MANIFEST = 'manifest.json'
/** Names that this file makes, `<stem>-<step>-<16 hex digits><extension>`: only such files are ever deleted. */
const OWN_FILE = /^[A-Za-z0-9][\w.-]*-\d+-[0-9a-f]{16}(\.[\w-]*)?$/
const OWN_TEMPORARY = /^manifest\.json\.[0-9a-f]{16}\.tmp$/
const NAME = /^[A-Za-z0-9][\w.-]{0,99}$/

const failure = (message: string, cause?: unknown) =>
  new HstuError('ERR_HSTU_CHECKPOINT', message, cause === undefined ? undefined : { cause })
const textOf = (error: unknown) => (error instanceof Error ? error.message : String(error))
const sha256 = (data: string | Uint8Array) => createHash('sha256').update(data).digest('hex')
const random = () => randomBytes(8).toString('hex')

/** The error code of the operating system, somewhere down the causes. */
function systemCode(error: unknown): string {
  for (let at = error; at instanceof Error; at = at.cause)
    if (!(at instanceof HstuError) && 'code' in at) return String(at.code)
  return ''
}

/** JSON would turn these into null, {} or nothing, and the run could not go on as it was. */
function checkJson(value: unknown, at: string): void {
  if (value === null || ['string', 'boolean', 'undefined'].includes(typeof value) || Number.isFinite(value)) return
  const tag = Object.prototype.toString.call(value)
  if (tag === '[object Array]') for (const [i, item] of (value as unknown[]).entries()) checkJson(item, `${at}[${i}]`)
  else if (tag === '[object Object]')
    for (const [key, item] of Object.entries(value as object)) checkJson(item, `${at}.${key}`)
  else throw failure(`${at}: expected what JSON can hold, found ${typeof value === 'number' ? value : tag}`)
}

function checkContent(at: string, step: number, { kind, tensors, json, files = {} }: CheckpointContent): void {
  if (!Number.isSafeInteger(step) || step < 0) throw failure(`${at}: expected a step of 0 or more, found ${step}`)
  if (typeof kind !== 'string') throw failure(`${at}: expected a kind as a string, found ${typeof kind}`)
  for (const name of [tensors, files].flatMap(Object.keys))
    if (!NAME.test(name))
      throw failure(`${at}: expected names of letters, digits, '_', '-' and '.', for they name files; found '${name}'`)
  checkJson(json, `${at}: json`)
}

const storedIn = ({ files, texts }: Pick<Manifest, 'files' | 'texts'>) => [files, texts].flatMap(x => Object.values(x))

/**
 * The manifest and its text; null when there is none.
 * @throws HstuError ERR_HSTU_CHECKPOINT when it is damaged, of a newer version or of something else.
 */
async function readManifest(folder: string): Promise<{ manifest: Manifest; text: string } | null> {
  const path = join(folder, MANIFEST)
  let text: string
  let parsed: Partial<Manifest> | null
  try {
    text = await readFile(path, 'utf8')
    parsed = JSON.parse(text)
  } catch (cause) {
    if (['ENOENT', 'ENOTDIR'].includes(systemCode(cause))) return null
    throw failure(`${path}: expected the manifest of a checkpoint: ${textOf(cause)}`, cause)
  }
  if (parsed?.format !== FORMAT)
    throw failure(`${path}: expected a manifest of format '${FORMAT}', found ${JSON.stringify(parsed?.format)}`)
  if (parsed.version !== VERSION) {
    const newer = Number(parsed.version) > VERSION ? `; hstu ${parsed.library} wrote it: update hstu to read it` : ''
    throw failure(`${path}: expected checkpoint version ${VERSION}, found ${JSON.stringify(parsed.version)}${newer}`)
  }
  const { sha256: expected, ...rest } = parsed as Manifest
  const found = sha256(JSON.stringify(rest))
  if (found !== expected)
    throw failure(`${path}: the manifest is damaged or was edited: expected SHA-256 ${expected}, found ${found}`)
  // Such a manifest was made on purpose; it must not lead out of the folder.
  if (!rest.files || !rest.texts || !storedIn(rest).every(stored => OWN_FILE.test(stored?.file)))
    throw failure(`${path}: expected data files in this folder, found ${JSON.stringify([rest.files, rest.texts])}`)
  return { manifest: parsed as Manifest, text }
}

async function syncFolder(folder: string): Promise<void> {
  const handle = await open(folder, 'r')
  try {
    await handle.sync()
  } catch (error) {
    // Some network file systems cannot sync a folder; then the rename is as durable as they make it.
    if (!['EINVAL', 'ENOTSUP', 'EPERM'].includes(systemCode(error))) throw error
  } finally {
    await handle.close()
  }
}

async function makeFolder(folder: string): Promise<void> {
  const first = await mkdir(folder, { recursive: true })
  if (first === undefined) return
  // Each new folder is an entry in its parent, and lost with it if that is not on the disk.
  for (let made = folder; made.length >= first.length; made = dirname(made)) await syncFolder(dirname(made))
}

async function writeText(path: string, text: string): Promise<Omit<StoredFile, 'file'>> {
  const data = Buffer.from(text)
  await writeFile(path, data, { flag: 'wx', flush: true })
  return { bytes: data.length, sha256: sha256(data) }
}

/** Deletes what earlier saves left: files of the names made here that `manifest` does not name. */
async function removeLeftovers(folder: string, manifest: Manifest | null): Promise<void> {
  const named = manifest ? storedIn(manifest).map(({ file }) => file) : []
  for (const name of await readdir(folder))
    if ((OWN_FILE.test(name) || OWN_TEMPORARY.test(name)) && !named.includes(name))
      // What cannot be deleted now is tried again by the next save; it harms nothing but the space it takes.
      await rm(join(folder, name), { force: true }).catch(() => {})
}

/** From the package.json above `lib/` or `dist/`. */
async function libraryVersion(): Promise<string> {
  const text = await readFile(new URL('../../package.json', import.meta.url), 'utf8').catch(() => null)
  return text === null ? 'unknown' : JSON.parse(text).version
}

const reasons: Record<string, string> = {
  ENOSPC: 'disk is full',
  EDQUOT: 'disk quota is used up',
  EACCES: 'no permission to write there',
  EROFS: 'the file system is read-only',
  ENOTDIR: 'a part of the path is a file, not a folder',
}

async function save(folder: string, step: number, content: CheckpointContent, json: string): Promise<void> {
  let intact = 'nothing was changed'
  try {
    await makeFolder(folder)
    const previous = (await readManifest(folder))?.manifest ?? null
    intact = previous ? `the previous checkpoint of step ${previous.step} is intact` : 'there was no checkpoint before'
    // Now, not only at the end: a killed save may have left what fills the disk.
    await removeLeftovers(folder, previous)
    const files: Record<string, StoredFile> = {}
    const texts: Record<string, StoredFile> = {}
    for (const [group, tensors] of Object.entries(content.tensors)) {
      const file = `${group}-${step}-${random()}.safetensors`
      const metadata = { kind: content.kind, group, step: String(step) }
      files[group] = { file, ...(await writeSafetensors(join(folder, file), tensors, metadata)) }
    }
    for (const [name, text] of Object.entries(content.files ?? {})) {
      const file = `${parse(name).name}-${step}-${random()}${parse(name).ext}`
      texts[name] = { file, ...(await writeText(join(folder, file), text)) }
    }
    const body = { format: FORMAT, version: VERSION, kind: content.kind, step, created: new Date().toISOString() }
    const rest = { ...body, library: await libraryVersion(), files, texts, json: JSON.parse(json) }
    const manifest = { ...rest, sha256: sha256(JSON.stringify(rest)) } as Manifest
    const temporary = `${MANIFEST}.${random()}.tmp`
    await writeText(join(folder, temporary), `${JSON.stringify(manifest, null, 2)}\n`)
    // The names of the data files must be on the disk before the manifest that uses them.
    await syncFolder(folder)
    for (const { file, bytes } of storedIn(manifest))
      if ((await stat(join(folder, file)).catch(() => null))?.size !== bytes)
        throw failure(`${file} is gone: does another process save to this folder?`)
    await rename(join(folder, temporary), join(folder, MANIFEST))
    intact = `the checkpoint of step ${step} is in place, but may not survive a power failure`
    await syncFolder(folder)
    await removeLeftovers(folder, manifest).catch(() => {})
  } catch (cause) {
    // By the manifest on the disk, for a network file system may report a rename as failed that was done.
    const removal = readManifest(folder).then(read => removeLeftovers(folder, read?.manifest ?? null))
    await removal.catch(() => {})
    const reason = reasons[systemCode(cause)]
    const what = `could not save the checkpoint of step ${step} in ${folder}`
    throw failure(`${reason ? `${reason}: ` : ''}${what}: ${textOf(cause)}; ${intact}`, cause)
  }
}

/** The last save to each folder: the next one waits for it. */
const saving = new Map<string, Promise<unknown>>()

/**
 * Writes a checkpoint to `folder` (made if missing) in place of the one there. The new one counts from one rename on, so that a
 * crash, a kill or a full disk at any moment leaves the previous checkpoint as it was. Saves to one folder wait for each other;
 * two processes must not save to the same folder.
 *
 * @param content - `json` is copied at once; tensors must not be changed or disposed until the promise settles.
 * @throws HstuError ERR_HSTU_CHECKPOINT, with the error of the operating system as a cause; what was written is removed. Also
 * when `folder` has a manifest.json that is not a valid checkpoint's: that is never overwritten.
 */
export async function saveCheckpoint(folder: string, step: number, content: CheckpointContent): Promise<void> {
  const path = resolve(folder)
  checkContent(path, step, content)
  const json = JSON.stringify(content.json)
  const turn = (saving.get(path) ?? Promise.resolve()).then(() => save(path, step, content, json))
  const settled = turn.catch(() => {})
  saving.set(path, settled)
  await turn.finally(() => saving.get(path) === settled && saving.delete(path))
}

async function load(folder: string, manifest: Manifest, groups: string[]): Promise<LoadedCheckpoint> {
  const { kind, step, json, files: all, texts } = manifest
  const missing = groups.find(group => !Object.hasOwn(all, group))
  if (missing !== undefined)
    throw failure(`${folder}: expected tensors of '${missing}', found only those of ${Object.keys(all).join(', ')}`)
  const files = Object.fromEntries(groups.map(group => [group, all[group]!]))
  for (const { file, bytes } of storedIn({ files, texts })) {
    const found = (await stat(join(folder, file)).catch(() => null))?.size
    if (found !== bytes)
      throw failure(`${join(folder, file)}: damaged: expected ${bytes} bytes, found ${found ?? 'no such file'}`)
  }
  const loaded: LoadedCheckpoint = { kind, step, json, tensors: {}, files: {} }
  for (const [name, { file, sha256: expected }] of Object.entries(texts)) {
    const data = await readFile(join(folder, file))
    if (sha256(data) !== expected)
      throw failure(`${join(folder, file)}: the file is damaged: expected SHA-256 ${expected}, found ${sha256(data)}`)
    loaded.files[name] = data.toString()
  }
  for (const [group, { file, sha256 }] of Object.entries(files))
    loaded.tensors[group] = (await readSafetensors(join(folder, file), { sha256 })).tensors
  return loaded
}

/**
 * Reads the checkpoint in `folder`. Size and SHA-256 of every file are verified before anything is returned. While another
 * process saves to the folder, one complete checkpoint is read.
 *
 * @param options.groups - read only these tensor groups, and verify only their files.
 * @throws HstuError ERR_HSTU_CHECKPOINT when there is none, it is damaged, or a newer version of this package wrote it.
 */
export async function loadCheckpoint(folder: string, options: { groups?: string[] } = {}): Promise<LoadedCheckpoint> {
  const path = resolve(folder)
  for (let attempt = 1; ; attempt++) {
    const read = await readManifest(path)
    if (!read) {
      const found = await readdir(path).then(names => `only [${names.slice(0, 8).join(', ')}]`, textOf)
      throw failure(`${path}: expected a checkpoint, a folder with ${MANIFEST} and the files it names; found ${found}`)
    }
    try {
      return await load(path, read.manifest, options.groups ?? Object.keys(read.manifest.files))
    } catch (error) {
      // A save may have replaced the checkpoint meanwhile, and deleted the files that this manifest names.
      const now = await readManifest(path).catch(() => null)
      if (attempt < 10 && now && now.text !== read.text) continue
      throw error instanceof HstuError ? error : failure(`${path}: cannot be read: ${textOf(error)}`, error)
    }
  }
}

/**
 * Writes the values of `source` into the tensors of `target`, once every name, shape and dtype is known to be the same.
 *
 * @param what - begins the message of an error.
 * @throws HstuError ERR_HSTU_CHECKPOINT naming every difference; then no tensor was written.
 */
export function assignTensors(target: Record<string, Tensor>, source: Map<string, HostTensor>, what: string): void {
  const describe = ({ dtype, shape }: Tensor | HostTensor) => `${dtype}[${shape.join(', ')}]`
  const problems: string[] = []
  for (const [name, tensor] of Object.entries(target)) {
    const found = source.get(name)
    if (!found) problems.push(`'${name}': expected ${describe(tensor)}, found none`)
    else if (describe(found) !== describe(tensor) || found.data.length !== tensor.size)
      problems.push(`'${name}': expected ${describe(tensor)}, found ${describe(found)} of ${found.data.length} values`)
    else if (tensor.disposed) problems.push(`'${name}': the tensor to write is disposed`)
  }
  for (const [name, found] of source)
    if (!Object.hasOwn(target, name)) problems.push(`'${name}': expected none, found ${describe(found)}`)
  if (problems.length) throw failure(`${what}: the tensors do not fit:\n  ${problems.join('\n  ')}`)
  for (const [name, tensor] of Object.entries(target)) tensor.write(source.get(name)!.data)
}
