import { native } from '#lib/native.js'
import type { Tensor } from '#lib/tensor.js'

type Method = (...args: unknown[]) => unknown

/** Calls of the addon's ops, made once and kept, so that they can be made again on the same tensors. */
export interface Calls {
  /** Each makes the calls between two marks again. */
  phases: (() => void)[]
  /** Frees what the calls read and write. */
  dispose: () => void
}

/**
 * Runs `fn` and keeps the op calls that it makes on the addon, with their tensors: what is then timed is the work of the backend,
 * of the forward or of the backward alone, without the tape.
 */
export function capture(fn: (mark: () => void) => void): Calls {
  const addon = native as unknown as Record<string, Method>
  const names = [...Object.keys(native.signatures), 'dispose']
  const methods = names.map(name => addon[name]!)
  const phases: (() => unknown)[][] = [[]]
  const kept = new Set<Tensor>()
  names.forEach((name, i) => {
    const method = methods[i]!
    addon[name] = (...args) => {
      phases.at(-1)!.push(() => method(...args))
      return method(...args)
    }
  })
  addon.dispose = tensor => void kept.add(tensor as Tensor)
  try {
    fn(() => phases.push([]))
  } finally {
    names.forEach((name, i) => {
      addon[name] = methods[i]!
    })
  }
  return {
    phases: phases.map(calls => () => {
      for (const call of calls) call()
    }),
    dispose: () => {
      for (const tensor of kept) tensor.dispose()
    },
  }
}
