// Run by `hstu doctor` in a process of its own: loading a binary that does not fit this host may end the process.

import { native } from '../native.js'
import { memory, Tensor } from '../tensor.js'

try {
  const one = Tensor.from([1])
  const works = one.item() === 1 && memory().tensors === 1
  one.dispose()
  const backend = native.backend()
  const free = backend.cuda.usable ? backend.cuda.devices.map((_, i) => memory(`cuda:${i}`).free) : []
  const found = { ...backend, free, ceilings: native.ceilings(), ops: Object.keys(native.signatures).length, works }
  process.stdout.write(JSON.stringify(found))
} catch (error) {
  process.stdout.write(JSON.stringify({ error: error instanceof Error ? error.message : String(error) }))
}
