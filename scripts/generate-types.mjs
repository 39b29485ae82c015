// Writes lib/native-types.ts from the signatures that the built addon exports, so that a wrong native call fails in tsc.
import { readFileSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = join(dirname(fileURLToPath(import.meta.url)), '..')
const addon = createRequire(import.meta.url)('node-gyp-build')(root)
const lines = Object.entries(addon.signatures).map(([name, parameters]) => `  ${name}(${parameters.join(', ')}): void`)
const text = `// Generated from the addon's signatures by scripts/generate-types.mjs.
import type { Tensor } from './tensor.js'

export interface NativeOps {
${lines.join('\n')}
}
`
const file = join(root, 'lib/native-types.ts')
let old = ''
try {
  old = readFileSync(file, 'utf8')
} catch {}
if (old !== text) writeFileSync(file, text)
