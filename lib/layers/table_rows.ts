import { check } from '../errors.js'
import { concat } from '../ops/concat.js'
import { embedding } from '../ops/embedding.js'
import { emptySlots, type HashIndex, hashLookup } from '../ops/hash_lookup.js'
import { randomUniform } from '../ops/random_uniform.js'
import { scope, Tensor, type TensorOptions, type TypedArray, unscoped } from '../tensor.js'

/** What an embedding table of C rows holds: `weights` [C, d], `accumulator` [C], and its index. */
export interface TableTensors extends HashIndex {
  weights: Tensor
  accumulator: Tensor
  lastUsed: Tensor
}

/** Rows that a new table begins with. */
export type KeptRows = Omit<TableTensors, 'slots' | 'count'>

/** Tensors as a checkpoint gives them back. */
export type SavedTensors = ReadonlyMap<string, { shape: readonly number[]; data: TypedArray }>

/** Those that a checkpoint keeps: slots are made again from the keys. */
export const tableTensors = ['weights', 'accumulator', 'rowKeys', 'lastUsed', 'count'] as const

function slotsOf(rowKeys: Tensor, given: number): Tensor {
  const { device } = rowKeys
  const slots = emptySlots(rowKeys.size, { device })
  const count = Tensor.from(BigInt64Array.of(1n), [1], { device })
  hashLookup({ rowKeys, count, lastUsed: null, slots }, rowKeys.rows(1, given), { insert: true })
  return slots
}

/** The rows of a, then those of b. */
function append(a: Tensor, b: Tensor): Tensor {
  const offsets = (x: Tensor) => Tensor.from(BigInt64Array.of(0n, BigInt(x.shape[0]!)), [2], { device: a.device })
  return concat(a, b, { aOffsets: offsets(a), bOffsets: offsets(b) }).values
}

/**
 * A table of `rows` rows outside every scope: the rows of `kept` (null: row 0 alone, of zeros), of which the first `given` have keys, then
 * rows without keys, their weights uniform in -bound .. bound at a position that `draw(rows)` gives.
 */
export function makeTable(
  rows: number,
  dim: number,
  kept: KeptRows | null,
  given: number,
  draw: (rows: number) => { bound: number; seed: bigint; offset: bigint },
  { dtype = 'float32', device = 'cpu' }: TensorOptions,
): TableTensors {
  const zeros = (shape: number[], as: NonNullable<TensorOptions['dtype']>) => Tensor.zeros(shape, { dtype: as, device })
  const sums = dtype === 'float64' ? 'float64' : 'float32'
  const make = (): TableTensors => {
    const first = kept ?? {
      ...{ weights: zeros([1, dim], dtype), accumulator: zeros([1], sums) },
      ...{ rowKeys: zeros([1], 'int64'), lastUsed: zeros([1], 'int32') },
    }
    const more = rows - first.rowKeys.size
    const rowKeys = append(first.rowKeys, zeros([more], 'int64'))
    return {
      weights: append(first.weights, randomUniform([more, dim], { ...draw(more), dtype, device })),
      accumulator: append(first.accumulator, zeros([more], sums)),
      rowKeys,
      lastUsed: append(first.lastUsed, zeros([more], 'int32')),
      count: Tensor.from(BigInt64Array.of(BigInt(given)), [1], { device }),
      slots: slotsOf(rowKeys, given),
    }
  }
  return unscoped(() => scope(make))
}

/** @throws HstuError ERR_HSTU_CHECKPOINT when a tensor is missing or of another shape. */
export function loadTable(
  saved: SavedTensors,
  dim: number,
  { dtype = 'float32', device = 'cpu' }: TensorOptions,
): TableTensors {
  const rows = saved.get('rowKeys')?.shape[0] ?? 1
  const expected = {
    weights: { shape: [rows, dim], dtype },
    accumulator: { shape: [rows], dtype: dtype === 'float64' ? dtype : ('float32' as const) },
    rowKeys: { shape: [rows], dtype: 'int64' as const },
    lastUsed: { shape: [rows], dtype: 'int32' as const },
    count: { shape: [1], dtype: 'int64' as const },
  }
  const load = (name: (typeof tableTensors)[number]) => {
    const { shape, dtype } = expected[name]
    const found = saved.get(name)
    const tensor = Tensor.empty(shape, { dtype, device })
    check(found?.shape.join(', ') === shape.join(', '), 'ERR_HSTU_CHECKPOINT', () => {
      return `EmbeddingTable: expected ${name} of shape [${shape.join(', ')}], found ${found ? `[${found.shape.join(', ')}]` : 'none'}`
    })
    tensor.write(found!.data)
    return tensor
  }
  const make = (): TableTensors => {
    const tensors = Object.fromEntries(tableTensors.map(name => [name, load(name)])) as unknown as TableTensors
    const given = tensors.count.item()
    check(
      given >= 1 && given <= rows,
      'ERR_HSTU_CHECKPOINT',
      () => `EmbeddingTable: ${given} of ${rows} rows are given`,
    )
    return { ...tensors, slots: slotsOf(tensors.rowKeys, given) }
  }
  return unscoped(() => scope(make))
}

/**
 * Chooses rows to give up: `count` of those longest not used, or as many as were not used at `tick`; of equals the smaller row first.
 * @param lastUsed of the rows that have been given, row 0 included, which always stays
 * @returns `gone`, longest not used first, and `kept`, ascending
 */
export function leastRecentlyUsed(
  lastUsed: Int32Array,
  tick: number,
  count: number,
): { gone: number[]; kept: number[] } {
  const ticks = lastUsed.slice(1).sort()
  const candidates = ticks.filter(used => used !== tick)
  const last = candidates[Math.min(count, candidates.length) - 1] ?? -1
  let ties = Math.min(count, candidates.length) - candidates.indexOf(last)
  const gone: number[] = []
  const kept = [0]
  for (let row = 1; row < lastUsed.length; row++)
    if (lastUsed[row]! < last || (lastUsed[row] === last && ties-- > 0)) gone.push(row)
    else kept.push(row)
  return { gone: gone.sort((a, b) => lastUsed[a]! - lastUsed[b]! || a - b), kept }
}

/** The rows `kept` of a table, whose keys and last uses the host has. */
export function takeRows(
  table: TableTensors,
  kept: readonly number[],
  rowKeys: BigInt64Array,
  lastUsed: Int32Array,
): KeptRows {
  const { device } = table.weights
  const ids = Tensor.from(BigInt64Array.from(kept, BigInt), undefined, { device })
  return {
    weights: embedding(table.weights, ids),
    accumulator: embedding(table.accumulator.view([table.accumulator.size, 1]), ids).view([kept.length]),
    rowKeys: Tensor.from(
      BigInt64Array.from(kept, row => rowKeys[row]!),
      undefined,
      { device },
    ),
    lastUsed: Tensor.from(
      Int32Array.from(kept, row => lastUsed[row]!),
      undefined,
      { device },
    ),
  }
}
