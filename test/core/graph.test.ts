import { describe, expect, it } from 'vitest'
import { captureGraph, graphed } from '#lib/graph.js'
import { native } from '#lib/native.js'
import { add } from '#lib/ops/add.js'
import { memory, scope, Tensor } from '#lib/tensor.js'

describe('graphs on the CPU', () => {
  it('run the function at each replay, into the same outputs', () => {
    const before = memory()
    const x = Tensor.from([1, 2])
    let runs = 0
    const graph = captureGraph(() => {
      runs++
      return { sum: add(x, x), x }
    })
    const { sum } = graph.outputs
    expect([...sum.dataSync()]).toEqual([2, 4])
    x.write(Float32Array.of(5, 6))
    expect(graph.replay().sum).toBe(sum)
    expect([...sum.dataSync()]).toEqual([10, 12])
    expect(runs).toBe(2)
    graph.dispose()
    expect(sum.disposed).toBe(true)
    expect(x.disposed).toBe(false)
    x.dispose()
    expect(memory()).toEqual(before)
  })

  it('refuse results whose shape or number changes', () => {
    let length = 1
    const graph = captureGraph(() => Array.from({ length }, () => Tensor.zeros([length])))
    length = 2
    const shape = (message: RegExp) =>
      expect.objectContaining({ code: 'ERR_HSTU_SHAPE', message: expect.stringMatching(message) })
    expect(() => graph.replay()).toThrow(shape(/returned 1 tensors, then 2/))
    graph.dispose()
    const other = captureGraph(() => Tensor.zeros([length]))
    length = 3
    expect(() => other.replay()).toThrow(shape(/output 0 was float32\[2\], then float32\[3\]/))
    other.dispose()
  })

  it('are plain calls for graphed', () => {
    const before = memory()
    const double = graphed((x: Tensor) => add(x, x))
    scope(() => {
      expect(double(Tensor.from([1])).item()).toBe(2)
      expect(double(Tensor.from([2])).item()).toBe(4)
    })
    double.dispose()
    expect(memory()).toEqual(before)
  })

  it('are refused by the addon', () => {
    const create = () => native.graph_create({}, 'cpu')
    expect(create).toThrow(expect.objectContaining({ code: 'ERR_HSTU_INVALID_ARGUMENT' }))
    expect(() => native.graph_launch({})).toThrow(expect.objectContaining({ message: 'not a graph' }))
    expect(() => native.graph_launch(null as never)).toThrow(expect.objectContaining({ message: 'not a graph' }))
  })
})
