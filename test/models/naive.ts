/** Plain float64 matrices for references: rows of numbers. */
export type Matrix = number[][]

export function matrix(data: ArrayLike<number>, columns: number): Matrix {
  return Array.from({ length: data.length / columns }, (_, i) =>
    Array.from({ length: columns }, (_, j) => data[i * columns + j]!),
  )
}

export function times(a: Matrix, b: Matrix): Matrix {
  return a.map(row => b[0]!.map((_, j) => row.reduce((sum, x, k) => sum + x * b[k]![j]!, 0)))
}

export function plus(a: Matrix, b: Matrix): Matrix {
  return a.map((row, i) => row.map((x, j) => x + b[i]![j]!))
}

export function plusRow(a: Matrix, bias: ArrayLike<number>): Matrix {
  return a.map(row => row.map((x, j) => x + bias[j]!))
}

export function layerNorm(a: Matrix, eps: number, weight?: ArrayLike<number>, bias?: ArrayLike<number>): Matrix {
  return a.map(row => {
    const mean = row.reduce((sum, x) => sum + x, 0) / row.length
    const variance = row.reduce((sum, x) => sum + (x - mean) ** 2, 0) / row.length
    return row.map((x, j) => ((x - mean) / Math.sqrt(variance + eps)) * (weight?.[j] ?? 1) + (bias?.[j] ?? 0))
  })
}

export function columns(a: Matrix, begin: number, end: number): Matrix {
  return a.map(row => row.slice(begin, end))
}

export function beside(parts: Matrix[]): Matrix {
  return parts[0]!.map((_, i) => parts.flatMap(part => part[i]!))
}

export function map(a: Matrix, fn: (x: number) => number): Matrix {
  return a.map(row => row.map(fn))
}

export function dot(a: readonly number[], b: readonly number[]): number {
  return a.reduce((sum, x, i) => sum + x * b[i]!, 0)
}

export const silu = (x: number) => x / (1 + Math.exp(-x))

/** x_t = E[id_t] sqrt(d) + P[t] */
export function inputOf(ids: readonly number[], items: Matrix, positions: Matrix): Matrix {
  const scale = Math.sqrt(items[0]!.length)
  return ids.map((id, t) => items[id]!.map((x, j) => x * scale + positions[t]![j]!))
}

export function unitRows(a: Matrix): Matrix {
  return a.map(row => {
    const norm = Math.max(Math.sqrt(dot(row, row)), 1e-6)
    return row.map(x => x / norm)
  })
}

/** Causal softmax attention of one sequence with biases, [L, d], heads side by side. */
export function multiHead(query: Matrix, x: Matrix, heads: number, get: (name: string) => Matrix | number[]): Matrix {
  const project = (from: Matrix, name: string) =>
    plusRow(times(from, get(name) as Matrix), get(`${name}Bias`) as number[])
  const [q, k, v] = [project(query, 'query'), project(x, 'key'), project(x, 'value')]
  const size = q[0]!.length / heads
  const parts = Array.from({ length: heads }, (_, h) => {
    const [qh, kh, vh] = [q, k, v].map(m => columns(m, h * size, (h + 1) * size)) as [Matrix, Matrix, Matrix]
    return qh.map((row, i) => {
      const weights = kh.slice(0, i + 1).map(key => Math.exp(dot(row, key) / Math.sqrt(size)))
      const sum = weights.reduce((a, b) => a + b, 0)
      return vh[0]!.map((_, c) => weights.reduce((total, w, j) => total + (w / sum) * vh[j]![c]!, 0))
    })
  })
  return plusRow(times(beside(parts), get('output') as Matrix), get('outputBias') as number[])
}
