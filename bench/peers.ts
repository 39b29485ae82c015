import { spawnSync } from 'node:child_process'
import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { native, packageRoot } from '#lib/native.js'

type Value = number | number[]
type Key = Record<string, number | string>
/** A row of bench/peers/<gpu>.json, or a line of a script of bench/peers. */
export type PeerRow = Record<string, Value | string | null>

const names = [
  ...['fa2', 'fa2_nested', 'cudnn', 'fbgemm', 'meta', 'cublas', 'pytorch', 'pytorch_graph', 'value'],
  ...['transformer_fa2', 'transformer_fa2_unpadded', 'hstu_pytorch_full', 'hstu_pytorch_raw', 'hstu_pytorch_sl16'],
]

/** 'NVIDIA H200' is h200, 'NVIDIA GeForce RTX 4090' is geforce-rtx-4090. */
export function gpuName(): string {
  const name = native.backend().cuda.devices[0]?.name ?? 'cuda'
  return name
    .replace(/^NVIDIA /, '')
    .toLowerCase()
    .replace(/\W+/g, '-')
}

let published: PeerRow[] | null = null

function publishedRows(): PeerRow[] {
  const file = join(packageRoot, 'bench/peers', `${gpuName()}.json`)
  return (published ??= existsSync(file) ? (JSON.parse(readFileSync(file, 'utf8')) as { rows: PeerRow[] }).rows : [])
}

const matches = (row: PeerRow, key: Key) => Object.entries(key).every(([name, value]) => row[name] === value)

/** Peers' figures for a case on this GPU, as published or measured in another run; of several the best. */
export function publishedPeers(key: Key): Record<string, Value> {
  const found: Record<string, Value> = {}
  for (const row of publishedRows().filter(row => matches(row, key)))
    for (const name of names) {
      const [value, before] = [row[name], found[name]]
      if (typeof value !== 'number' && !Array.isArray(value)) continue
      // Only times are given more than once a case.
      found[name] = typeof value === 'number' && typeof before === 'number' ? Math.min(value, before) : value
    }
  return found
}

/** The peers' figures among rows of this run. */
export function peersIn(rows: readonly PeerRow[], key: Key): Record<string, Value> {
  const row = rows.find(row => matches(row, key)) ?? {}
  const entries = names.map(name => [name, row[name]] as const)
  return Object.fromEntries(entries.filter((entry): entry is [string, Value] => entry[1] != null))
}

/**
 * FlashAttention-2, cuDNN and cuBLAS through PyTorch on `cases`, in a process of its own; nothing where python3 has no torch.
 * A case may carry the lengths of its sequences.
 */
export function torchPeers(cases: readonly object[]): PeerRow[] {
  if (spawnSync('python3', ['-c', 'import torch']).status !== 0) {
    process.stdout.write('no PyTorch (python3 -c "import torch" fails): peers are those of bench/peers alone\n')
    return []
  }
  const script = join(packageRoot, 'bench/peers/torch_attention.py')
  const options = { input: JSON.stringify(cases), encoding: 'utf8', timeout: 240_000, maxBuffer: 2 ** 26 } as const
  const { status, stdout, stderr, error } = spawnSync('python3', [script], options)
  const rows = (stdout ?? '').split('\n').flatMap(line => (line.startsWith('{') ? [JSON.parse(line) as PeerRow] : []))
  for (const row of rows) if (row.error) process.stderr.write(`${script}: ${row.case}: ${row.error}\n`)
  if (status !== 0) process.stderr.write(`${script} failed: ${error?.message ?? stderr.slice(-2000)}\n`)
  return rows
}
