import { describe, expect, it } from 'vitest'
import { record, reshape, valueAndGrad } from '#lib/autograd.js'
import { add } from '#lib/ops/add.js'
import { linear } from '#lib/ops/linear.js'
import { emptyLike, memory, scope, Tensor } from '#lib/tensor.js'

/** Sum of all elements, as a product with ones. */
function total(x: Tensor): Tensor {
  return linear(reshape(x, [1, x.size]), Tensor.from(new Float32Array(x.size).fill(1), [x.size, 1]))
}

const values = (tensor: Tensor) => [...(tensor.dataSync() as Float32Array)]

describe('valueAndGrad', () => {
  it('adds the gradients of a tensor that is used twice', () => {
    scope(() => {
      const x = Tensor.from([1, 2, 3])
      const { value, grads } = valueAndGrad({ x }, () => total(add(add(x, x), x)))
      expect(value.item()).toBe(18)
      expect(values(grads.x)).toEqual([3, 3, 3])
    })
  })

  it('gives zeros to a parameter that was not used', () => {
    scope(() => {
      const [x, y] = [Tensor.from([1, 2]), Tensor.from([3, 4])]
      const { grads } = valueAndGrad([x, y], () => total(x))
      expect(values(grads[1]!)).toEqual([0, 0])
    })
  })

  it('frees everything but the value and the gradients', () => {
    const x = Tensor.from([1, 2])
    const before = memory().tensors
    const { value, grads } = valueAndGrad([x], () => total(add(x, x)))
    expect(memory().tensors).toBe(before + 2)
    for (const tensor of [value, grads[0]!, x]) tensor.dispose()
  })

  it('keeps what the backward needs when it is disposed, or its scope ends, inside', () => {
    const before = memory().tensors
    const [x, w] = [Tensor.from([1, 2], [1, 2]), Tensor.from([3, 4], [2, 1])]
    const { value, grads } = valueAndGrad([w], () =>
      scope(() => {
        const doubled = add(x, x)
        const y = linear(doubled, w)
        doubled.dispose()
        return y
      }),
    )
    expect(value.item()).toBe(22)
    expect(values(grads[0]!)).toEqual([2, 4])
    for (const tensor of [value, grads[0]!, x, w]) tensor.dispose()
    expect(memory().tensors).toBe(before)
  })

  it('records nothing that no parameter reaches, and nothing outside', () => {
    scope(() => {
      const [x, y] = [Tensor.from([1, 2]), Tensor.from([1, 2])]
      let called = false
      const spy = (input: Tensor) =>
        record('spy', emptyLike(input), [input], () => {
          called = true
          return [null]
        })
      spy(x)
      valueAndGrad([x], () => {
        spy(y)
        return total(x)
      })
      expect(called).toBe(false)
    })
  })

  it('refuses nesting, a value that is no scalar, and a gradient of another shape; memory() is unchanged', () => {
    const x = Tensor.from([1, 2])
    const before = memory()
    const code = (wanted: string, message: RegExp) =>
      expect.objectContaining({ code: wanted, message: expect.stringMatching(message) })
    expect(() => valueAndGrad([x], () => valueAndGrad([x], () => total(x)).value)).toThrow(
      code('ERR_HSTU_INVALID_ARGUMENT', /nested/),
    )
    expect(() => valueAndGrad([x], () => add(x, x))).toThrow(code('ERR_HSTU_SHAPE', /scalar, got float32\[2\]/))
    const wrong = () => record('wrong', Tensor.zeros([1]), [x], () => [Tensor.zeros([3])])
    expect(() => valueAndGrad([x], wrong)).toThrow(
      code('ERR_HSTU_SHAPE', /wrong: gradient 0 is float32\[3\], its input is float32\[2\]/),
    )
    expect(memory()).toEqual(before)
    x.dispose()
  })
})
