import { EmbeddingTable, type EvictionReport } from '#lib/layers/embedding_table.js'
import { native } from '#lib/native.js'
import { Random } from '#lib/random.js'
import { type Device, memory, scope, Tensor } from '#lib/tensor.js'

const devices: Device[] = native.backend().cuda.usable ? ['cpu', 'cuda'] : ['cpu']

/** The table as it should be: keys by row, their last use, and values as last seen. */
class Model {
  keys: (bigint | null)[] = [null]
  used = [0]
  readonly rowOf = new Map<bigint, number>()
  readonly values = new Map<bigint, number[]>()
  capacity: number
  evicted = 0
  tick = 0

  constructor(readonly config: { rows: number; maxRows: number; evictShare: number }) {
    this.capacity = config.rows
  }

  insert(keys: readonly bigint[]): number[] {
    this.tick++
    const { maxRows, evictShare } = this.config
    const room = () => this.capacity - this.keys.length
    if (room() < keys.length && this.capacity < maxRows)
      this.capacity = Math.min(maxRows, Math.max(2 * this.capacity, this.keys.length + keys.length))
    for (const key of keys) if (this.rowOf.has(key)) this.used[this.rowOf.get(key)!] = this.tick
    const fresh = [...new Set(keys)].filter(key => !this.rowOf.has(key))
    if (fresh.length > room()) {
      const rows = this.keys.map((_, row) => row).filter(row => row > 0 && this.used[row] !== this.tick)
      rows.sort((a, b) => this.used[a]! - this.used[b]! || a - b)
      const gone = new Set(rows.slice(0, Math.max(fresh.length - room(), Math.ceil(evictShare * this.capacity))))
      this.evicted += gone.size
      for (const row of gone) this.values.delete(this.keys[row]!)
      const kept = this.keys.map((_, row) => row).filter(row => !gone.has(row))
      this.keys = kept.map(row => this.keys[row]!)
      this.used = kept.map(row => this.used[row]!)
      this.rowOf.clear()
      for (const [row, key] of this.keys.entries()) if (row > 0) this.rowOf.set(key!, row)
    }
    for (const key of fresh) {
      this.rowOf.set(key, this.keys.length)
      this.keys.push(key)
      this.used.push(this.tick)
    }
    return this.find(keys)
  }

  find(keys: readonly bigint[]): number[] {
    return keys.map(key => this.rowOf.get(key) ?? 0)
  }
}

it.each(devices)(
  'a million keys looked up on %s: rows, growth, evictions and values as a Map has them, through restored checkpoints',
  device => {
    const config = { dim: 2, rows: 64, maxRows: 20_000, evictShare: 0.05, whenFull: 'evict' as const }
    const before = memory()
    scope(() => {
      const random = new Random(17)
      const model = new Model(config)
      let reported = 0
      const onEvict = (report: EvictionReport) => {
        reported += report.keys.length
        expect(report.lastUsed).toEqual(report.lastUsed.slice().sort())
        expect(report.kept + report.keys.length).toBeLessThan(config.maxRows)
      }
      let table = new EmbeddingTable({ ...config, onEvict }, { device })
      let total = 0
      for (let batch = 0; total < 1_000_000; batch++)
        scope(() => {
          const size = random.int(4000)
          total += size
          // Popular keys, and a tail that moves on.
          const key = () =>
            BigInt.asIntN(64, BigInt(Math.floor(total / 20 + 12_000 * random.float() ** 3)) * 0x9e3779b97f4a7c15n)
          const keys = Array.from({ length: size }, key)
          const tensor = Tensor.from(BigInt64Array.from(keys), [size], { device })
          const insert = random.int(5) > 0
          const rows = table.lookup(tensor, { insert })
          const expected = insert ? model.insert(keys) : model.find(keys)
          expect(rows.ids.dataSync()).toEqual(BigInt64Array.from(expected, BigInt))
          const read = () => table.embed(rows).dataSync()
          const check = read()
          for (const [t, name] of keys.entries()) {
            const known = model.values.get(name)
            if (known && (check[2 * t] !== known[0] || check[2 * t + 1] !== known[1]))
              throw new Error(`batch ${batch}: values of key ${name} are ${check[2 * t]}, were ${known}`)
          }
          if (insert) {
            const gradient = Float32Array.from({ length: 2 * size }, () => random.normal())
            table.step(rows, Tensor.from(gradient, [size, 2], { device }), 0.1)
            const after = read()
            for (const [t, name] of keys.entries())
              model.values.set(name, [Number(after[2 * t]), Number(after[2 * t + 1])])
          }
          if (batch % 50 === 49) {
            const { tensors, json } = table.state()
            const saved = new Map(
              Object.entries(tensors).map(([name, x]) => [name, { shape: x.shape, data: x.dataSync() }]),
            )
            const other = new EmbeddingTable({ ...config, onEvict }, { device })
            other.restore(saved, JSON.parse(JSON.stringify(json)))
            table.dispose()
            table = other
          }
        })
      expect(table.size).toBe(model.keys.length - 1)
      expect(table.rows).toBe(model.capacity)
      expect(table.rows).toBe(config.maxRows)
      expect(table.evicted).toBe(model.evicted)
      expect(model.evicted).toBeGreaterThan(10_000)
      expect(reported).toBe(model.evicted)
      table.dispose()
    })
    expect(memory()).toEqual(before)
  },
)
