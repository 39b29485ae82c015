// node ops.mjs csrc/ops.h out: the definition of every cuda:: op as "the CPU's, later, on the stream".
import { readFileSync, writeFileSync } from 'node:fs'

const [source, target] = process.argv.slice(2)
const ops = [...readFileSync(source, 'utf8').matchAll(/^HSTU_OP\((\w+),([^;]*?)\)$/gm)]
const definitions = ops.map(([, name, parameters]) => {
  const names = parameters.split(',').map(parameter => /(\w+)\s*$/.exec(parameter)[1])
  const named = names.at(-1) === 'Stream' ? parameters.replace(/Stream\s*$/, 'Stream stream') : parameters
  const all = [...names.slice(0, -1), 'stream']
  return `namespace hstu::cuda {\nvoid ${name}(${named.replace(/Stream \w+\s*$/, 'Stream stream')}) {\n  later(stream, cpu::${name}, ${all.join(', ')});\n}\n}\n`
})
if (definitions.length === 0) throw new Error(`no HSTU_OP in ${source}`)
writeFileSync(target, definitions.join(''))
