import { describe, expect, it } from 'vitest'
import { valueAndGrad } from '#lib/autograd.js'
import type { SequenceInputs } from '#lib/layers/inputs.js'
import { nextItemLoss } from '#lib/losses/next_item.js'
import { type AnySequenceModel, createModel, type ModelSpec } from '#lib/models/create.js'
import { Philox } from '#lib/philox.js'
import { Random } from '#lib/random.js'
import { memory, scope, Tensor } from '#lib/tensor.js'
import { relativeError } from '../harness.js'
import {
  beside,
  columns,
  dot,
  inputOf,
  layerNorm,
  type Matrix,
  map,
  matrix,
  multiHead,
  plus,
  plusRow,
  silu,
  times,
  unitRows,
} from './naive.js'

const common = {
  numItems: 11,
  dim: 8,
  layers: 2,
  heads: 2,
  maxLength: 9,
  paddedLength: 12,
  inputDropout: 0.2,
  linearDropout: 0.2,
}
const specs: Record<string, ModelSpec> = {
  hstu: { kind: 'hstu', config: { ...common, qkDim: 3, vDim: 5 } },
  'hstu, industrial form': {
    kind: 'hstu',
    config: { ...common, qkDim: 3, vDim: 5, affine: true, siluAll: false, alpha: 3 ** -0.5, concat: true },
  },
  'hstu, softmax without bias': {
    kind: 'hstu',
    config: { ...common, qkDim: 4, vDim: 4, activation: 'softmax', positionBias: false, timeBias: false },
  },
  sasrec: { kind: 'sasrec', config: { ...common, ffnDim: 6 } },
  transformer: { kind: 'transformer', config: common },
}

const sequences = [[3, 1, 4, 1, 5, 9, 2], [6], [], [5, 3, 5, 8, 9, 7, 9, 3, 2]]
const clock = (id: number, t: number) => 1_000_000 + t * t * 1000 + id * 17

function inputsOf(list: number[][]): SequenceInputs {
  const offsets = [0]
  for (const ids of list) offsets.push(offsets.at(-1)! + ids.length)
  const big = (values: number[]) => Tensor.from(BigInt64Array.from(values.map(BigInt)))
  const times = list.flatMap(ids => ids.map(clock))
  const next = list.flatMap(ids =>
    ids.map((id, t) => (t + 1 < ids.length ? clock(ids[t + 1]!, t + 1) : clock(id, t) + 500)),
  )
  return {
    ids: big(list.flat()),
    seqOffsets: big(offsets),
    times: big(times),
    queryTimes: big(next),
    maxSeqLen: Math.max(...list.map(ids => ids.length)),
  }
}

/** Parameters by name, as matrices (vectors as arrays). */
function reader(model: AnySequenceModel): (name: string) => Matrix & number[] {
  return name => {
    const tensor = model.parameters[name]!
    const data = tensor.dataSync() as Float64Array
    return (tensor.rank === 1 ? [...data] : matrix(data, tensor.shape[1]!)) as Matrix & number[]
  }
}

function hstuLayer(x: Matrix, ids: number[], name: string, model: AnySequenceModel): Matrix {
  const spec = model.config as Extract<ModelSpec, { kind: 'hstu' }>['config']
  const get = reader(model)
  const { heads: H, qkDim: D, vDim: V, paddedLength: N, activation = 'silu', affine, siluAll = true, concat } = spec
  const p = (key: string) => get(`${name}.${key}`)
  const alpha = spec.alpha ?? (activation === 'silu' ? 1 : D ** -0.5)
  const norm = affine ? layerNorm(x, 1e-6, p('inputNormWeight'), p('inputNormBias')) : layerNorm(x, 1e-6)
  let z = times(norm, p('uvqk'))
  if (affine) z = plusRow(z, p('uvqkBias'))
  const parts = [
    columns(z, 0, H * V),
    columns(z, H * V, 2 * H * V),
    columns(z, 2 * H * V, 2 * H * V + H * D),
    columns(z, 2 * H * V + H * D, 2 * H * (V + D)),
  ]
  const [u, v, q, k] = parts.map((part, i) => (i === 0 || siluAll ? map(part, silu) : part)) as [
    Matrix,
    Matrix,
    Matrix,
    Matrix,
  ]
  const query = (i: number) => (i + 1 < ids.length ? clock(ids[i + 1]!, i + 1) : clock(ids[i]!, i) + 500)
  const bucket = (d: number) => Math.trunc(Math.log(Math.max(d, 1)) / 0.301)
  const bias = (i: number, j: number) => {
    const position = spec.positionBias === false ? 0 : p('positionBias')[0]![i - j]!
    return position + (spec.timeBias === false ? 0 : p('timeBias')[0]![bucket(Math.abs(query(i) - clock(ids[j]!, j)))]!)
  }
  const heads = Array.from({ length: H }, (_, h) =>
    q.map((row, i) => {
      const scores = k.slice(0, i + 1).map((key, j) => {
        return alpha * dot(row.slice(h * D, (h + 1) * D), key.slice(h * D, (h + 1) * D)) + bias(i, j)
      })
      const sum = scores.reduce((total, s) => total + Math.exp(s), 0)
      const weights = scores.map(s => (activation === 'silu' ? silu(s) / N : Math.exp(s) / sum))
      return Array.from({ length: V }, (_, c) => weights.reduce((total, w, j) => total + w * v[j]![h * V + c]!, 0))
    }),
  )
  const o = beside(heads)
  const a = affine ? layerNorm(o, 1e-6, p('outputNormWeight'), p('outputNormBias')) : layerNorm(o, 1e-6)
  const gated = u.map((row, i) => row.map((value, j) => value * a[i]![j]!))
  return plus(x, plusRow(times(concat ? beside([u, o, gated]) : gated, p('output')), p('outputBias')))
}

function naive(model: AnySequenceModel, ids: number[]): Matrix {
  const get = reader(model)
  let x = inputOf(ids, get('items'), get('positions'))
  for (let i = 0; i < model.config.layers; i++) {
    if (model.kind === 'hstu') x = hstuLayer(x, ids, `layers.${i}`, model)
    else {
      const attention = (name: string) => get(`blocks.${i}.attention.${name}`)
      const ffn = (name: string) => get(`blocks.${i}.feedForward.${name}`)
      const normed = (y: Matrix, name: string) =>
        layerNorm(y, 1e-6, get(`blocks.${i}.${name}.weight`), get(`blocks.${i}.${name}.bias`))
      if (model.kind === 'sasrec') {
        const q = layerNorm(x, 1e-8)
        const x1 = layerNorm(plus(q, multiHead(q, x, 2, attention)), 1e-8)
        const hidden = map(plusRow(times(x1, ffn('hidden')), ffn('hiddenBias')), y => Math.max(y, 0))
        x = plus(x1, plusRow(times(hidden, ffn('output')), ffn('outputBias')))
      } else {
        const first = normed(x, 'norm1')
        const x1 = plus(x, multiHead(first, first, 2, attention))
        // tanh form is within 1e-3 of erf's: too coarse, so GELU by numeric integration of the normal density
        const hidden = map(plusRow(times(normed(x1, 'norm2'), ffn('hidden')), ffn('hiddenBias')), y => y * normalCdf(y))
        x = plus(x1, plusRow(times(hidden, ffn('output')), ffn('outputBias')))
      }
    }
  }
  if (model.kind === 'transformer') x = layerNorm(x, 1e-6, get('norm.weight'), get('norm.bias'))
  return unitRows(x)
}

/** Simpson's rule on the density: 1e-12 for |x| < 6. */
function normalCdf(x: number): number {
  const n = 2000
  const h = x / n
  const density = (t: number) => Math.exp((-t * t) / 2) / Math.sqrt(2 * Math.PI)
  let sum = density(0) + density(x)
  for (let i = 1; i < n; i++) sum += (i % 2 ? 4 : 2) * density(i * h)
  return 0.5 + (sum * h) / 3
}

/** Makes parameters large enough that every term matters (initial tables are near 0). */
function stir(model: AnySequenceModel): void {
  const random = new Random(7)
  for (const tensor of Object.values(model.parameters)) {
    const data = tensor.dataSync() as Float64Array
    tensor.write(data.map(x => x + 0.3 * random.normal()))
  }
}

describe.each(Object.entries(specs))('%s', (_, spec) => {
  it('computes the equations of its paper', () => {
    const model = createModel(spec, 1, { dtype: 'float64' })
    stir(model)
    const before = memory()
    scope(() => {
      const actual = model.forward(inputsOf(sequences)).dataSync() as Float64Array
      const expected = sequences.flatMap(ids => (ids.length ? naive(model, ids) : [])).flat()
      expect(relativeError(actual, expected)).toBeLessThan(1e-11)
    })
    expect(memory()).toEqual(before)
    model.dispose()
  })

  it('gives a sequence the same bits whoever shares the batch', () => {
    const model = createModel(spec, 1)
    scope(() => {
      const all = model.forward(inputsOf(sequences)).dataSync() as Float32Array
      const alone = model.forward(inputsOf([sequences[3]!])).dataSync() as Float32Array
      expect(alone).toEqual(all.slice(-alone.length))
    })
    model.dispose()
  })

  it('has gradients of the whole loss that finite differences confirm, dropout included', () => {
    const model = createModel(spec, 1, { dtype: 'float64' })
    stir(model)
    const loss = (inputs: SequenceInputs) => {
      const targets = Tensor.from(BigInt64Array.from({ length: inputs.ids.size }, (_, i) => BigInt(1 + ((i * 5) % 11))))
      const weights = Tensor.from(Float64Array.from({ length: inputs.ids.size }, (_, i) => (i % 4 === 0 ? 0 : 1)))
      const philox = new Philox(5n)
      const output = model.forward(inputs, philox)
      return nextItemLoss(output, model.parameters.items!, targets, weights, philox, {
        numNegatives: 4,
        temperature: 0.5,
      })
    }
    const names = Object.keys(model.parameters)
    const gradients = scope(() => {
      const inputs = inputsOf(sequences)
      const { grads } = valueAndGrad(model.parameters, () => loss(inputs))
      return Object.fromEntries(names.map(name => [name, Float64Array.from(grads[name]!.dataSync() as Float64Array)]))
    })
    const random = new Random(3)
    for (const name of names) {
      const tensor = model.parameters[name]!
      const data = tensor.dataSync() as Float64Array
      for (let sample = 0; sample < 4; sample++) {
        const i = random.int(data.length)
        const at = (delta: number) => {
          tensor.write(data.map((x, j) => (j === i ? x + delta : x)))
          return scope(() => loss(inputsOf(sequences)).item())
        }
        const numeric = (at(1e-5) - at(-1e-5)) / 2e-5
        tensor.write(data)
        expect(Math.abs(numeric - gradients[name]![i]!), `${name}[${i}]`).toBeLessThan(
          1e-7 * Math.max(1, Math.abs(numeric)),
        )
      }
    }
    model.dispose()
  })
})

describe('SequenceModel', () => {
  it('is the same for the same seed and another for another', () => {
    const make = (seed: number) => {
      const model = createModel(specs.hstu!, seed)
      const data = Object.values(model.parameters).map(tensor => tensor.dataSync())
      model.dispose()
      return data
    }
    expect(make(1)).toEqual(make(1))
    expect(make(1)).not.toEqual(make(2))
  })

  it('names what is wrong with a config or an input', () => {
    const bad = (config: object, message: RegExp) => {
      const spec = { kind: 'hstu', config: { ...specs.hstu!.config, ...config } } as ModelSpec
      expect(() => createModel(spec)).toThrow(
        expect.objectContaining({ code: 'ERR_HSTU_INVALID_ARGUMENT', message: expect.stringMatching(message) }),
      )
    }
    bad({ dim: 0 }, /dim must be a positive integer, got 0/)
    bad({ paddedLength: 5 }, /paddedLength 5 is below maxLength 9/)
    expect(() => createModel({ kind: 'gru' } as never)).toThrow(/unknown model 'gru': one of hstu, sasrec, transformer/)
    const model = createModel(specs.hstu!)
    expect(() => scope(() => model.forward(inputsOf([Array(13).fill(1)])))).toThrow(
      /13 tokens is longer than the model's paddedLength 12/,
    )
    expect(() => scope(() => model.forward(inputsOf([[99]])))).toThrow(/99/)
    model.dispose()
  })
})
