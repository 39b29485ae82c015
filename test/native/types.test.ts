import { readFileSync } from 'node:fs'
import { native } from '#lib/native.js'
import type { Tensor } from '#lib/tensor.js'

// Never called: `npm run typecheck` fails when one of these calls stops being an error ("unused @ts-expect-error").
function wrongCalls(x: Tensor): void {
  native.add(x, x, x)
  // @ts-expect-error an argument is missing
  native.add(x, x)
  // @ts-expect-error one argument too many
  native.add(x, x, x, x)
  // @ts-expect-error no tensor
  native.add(x, x, [1, 2])
  // @ts-expect-error not optional
  native.add(x, x, null)
  native.linear(x, null, x, x, null, null, 'silu')
  // @ts-expect-error no such activation
  native.linear(x, null, x, x, null, null, 'swish')
  // @ts-expect-error a number is no bigint
  native.dropout(x, x, 0.5, 1, 0n, null)
  // @ts-expect-error no such op
  native.no_such_op(x)
}

it('writes the types of every op from its C++ signature', () => {
  const types = readFileSync(new URL('../../lib/native-types.ts', import.meta.url), 'utf8')
  for (const [op, parameters] of Object.entries(native.signatures))
    expect(types).toContain(`  ${op}(${parameters.join(', ')}): void\n`)
  expect(wrongCalls).toBeTypeOf('function')
})
