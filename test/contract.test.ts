// The rules of the code base that no compiler checks: the places of an op, the directions of imports and includes, budgets.
import { execFileSync } from 'node:child_process'
import { existsSync, readFileSync } from 'node:fs'
import { basename, dirname, join, normalize } from 'node:path'
import { fileURLToPath } from 'node:url'
import ts from 'typescript'

const root = fileURLToPath(new URL('..', import.meta.url))
const files = execFileSync('git', ['ls-files', '--cached', '--others', '--exclude-standard'], {
  cwd: root,
  encoding: 'utf8',
})
  .split('\n')
  .filter(file => file && existsSync(join(root, file)))
const read = (file: string) => readFileSync(join(root, file), 'utf8')
const under = (pattern: RegExp) => files.filter(file => pattern.test(file))

const ops = [...read('csrc/ops.h').matchAll(/^HSTU_OP\((\w+),/gm)].map(match => match[1]!)
const stemOf = (op: string) => op.replace(/_backward$/, '')
const stems = [...new Set(ops.map(stemOf))]
const camelCase = (stem: string) => stem.replace(/_(\w)/g, (_, letter: string) => letter.toUpperCase())
const hasCuda = files.some(file => /^cuda\/.*\.cu$/.test(file))

describe('places of an op', () => {
  it.each(stems)('%s', stem => {
    const places = [`csrc/cpu/${stem}.cpp`, `lib/ops/${stem}.ts`, `test/ops/${stem}.test.ts`, `bench/${stem}.bench.ts`]
    const missing = places.filter(place => !files.includes(place))
    if (hasCuda && !files.includes(`cuda/${stem}.cu`)) missing.push(`cuda/${stem}.cu`)
    const binding = read('csrc/binding.cpp')
    for (const op of ops)
      if (stemOf(op) === stem && !binding.includes(`HSTU_BIND(${op})\n`))
        missing.push(`HSTU_BIND(${op}) in csrc/binding.cpp`)
    if (
      files.includes(`lib/ops/${stem}.ts`) &&
      !read(`lib/ops/${stem}.ts`).includes(`export function ${camelCase(stem)}(`)
    )
      missing.push(`export function ${camelCase(stem)} in lib/ops/${stem}.ts`)
    expect(missing).toEqual([])
  })

  it('has no file without an op', () => {
    const opFiles = under(/^(lib\/ops\/.*|test\/ops\/.*|bench\/.*\.bench\.ts)$/)
    // What one test file of an op is too long for stands in a folder of its name.
    const named = (file: string) => /^test\/ops\/(\w+)\//.exec(file)?.[1] ?? basename(file)
    expect(opFiles.filter(file => !stems.includes(named(file).replace(/(\.test|\.bench)?\.ts$/, '')))).toEqual([])
    // Beside the ops, csrc/cpu implements its own headers and what storage.h declares of a backend.
    const support = (file: string) => /\/(memory|ceiling)\.cpp$/.test(file) || files.includes(file.replace(/cpp$/, 'h'))
    const strangers = under(/^csrc\/cpu\/.*\.cpp$/).filter(
      file => !stems.includes(basename(file, '.cpp').replace(/_backward$/, '')) && !support(file),
    )
    expect(strangers).toEqual([])
    const kernels = under(/^cuda\/[^/]*\.cu$/).filter(file => !/^cuda\/(memory|graph)\.cu$/.test(file))
    const shared = (file: string) => files.includes(file.replace(/cu$/, 'cuh'))
    const stray = (file: string) =>
      !stems.includes(basename(file, '.cu').replace(/(_sm90)?(_bwd)?$/, '')) && !shared(file)
    expect(kernels.filter(stray)).toEqual([])
  })

  it('binds nothing that is not declared', () => {
    const bound = [...read('csrc/binding.cpp').matchAll(/^ +HSTU_BIND\((\w+)\)/gm)].map(match => match[1]!)
    expect(bound.filter(op => !ops.includes(op))).toEqual([])
    expect(new Set(bound).size).toBe(bound.length)
  })
})

interface Edge {
  from: string
  to: string
  typeOnly: boolean
  dynamic: boolean
}

/** Every import of a TypeScript file, relative ones as paths from the root with the source's extension. */
function importsOf(file: string): Edge[] {
  const source = ts.createSourceFile(file, read(file), ts.ScriptTarget.ES2022)
  const edges: Edge[] = []
  const add = (specifier: ts.Expression | undefined, typeOnly: boolean, dynamic: boolean) => {
    if (!specifier || !ts.isStringLiteral(specifier)) return
    const text = specifier.text
    const to = text.startsWith('.') ? normalize(join(dirname(file), text)).replace(/\.js$/, '.ts') : text
    edges.push({ from: file, to, typeOnly, dynamic })
  }
  const visit = (node: ts.Node): void => {
    if (ts.isImportDeclaration(node))
      add(node.moduleSpecifier, node.importClause?.phaseModifier === ts.SyntaxKind.TypeKeyword, false)
    if (ts.isExportDeclaration(node)) add(node.moduleSpecifier, node.isTypeOnly, false)
    if (ts.isCallExpression(node) && node.expression.kind === ts.SyntaxKind.ImportKeyword)
      add(node.arguments[0], false, true)
    ts.forEachChild(node, visit)
  }
  visit(source)
  return edges
}

// Above may import below, siblings may import each other without a cycle, a folder its own files.
const levels = [
  ['index', 'cli'],
  ['serve', 'train', 'eval', 'data'],
  ['models'],
  ['layers', 'losses', 'optim'],
  ['ops', 'graph'],
  ['tensor', 'autograd'],
  ['native', 'native-types'],
]
// Small modules without state of the library's, open to all of it; checks.ts stands on tensor.ts, and philox.ts speaks of its Tensor.
const leaves = ['errors', 'random', 'philox', 'checks']
const withoutNative = ['models', 'layers', 'losses', 'optim']

const partOf = (file: string) =>
  file
    .replace(/^lib\//, '')
    .replace(/\.ts$/, '')
    .split('/')[0]!
const levelOf = (part: string) => levels.findIndex(level => level.includes(part))

/** Why an import inside lib is not allowed, or null. */
function violation({ from, to, typeOnly }: Edge): string | null {
  const [source, target] = [partOf(from), partOf(to)]
  if (leaves.includes(source)) {
    const onTensor = target === 'tensor' && (source === 'checks' || (source === 'philox' && typeOnly))
    return leaves.includes(target) || onTensor ? null : 'a leaf'
  }
  if (leaves.includes(target)) return null
  if (source === 'ops')
    return ['tensor', 'autograd', 'native'].includes(target) ? null : 'an op imports tensor, autograd and native alone'
  if (source === target) return null
  if (target === 'native' && withoutNative.includes(source)) return 'goes to native past the ops'
  if (source === 'index' || target === 'index')
    return target === 'index' || target === 'cli' ? 'nothing imports this' : null
  // The addon's own types speak of the Tensor that wraps its handle.
  if (levelOf(source) === levelOf('native') && target === 'tensor' && typeOnly) return null
  return levelOf(target) >= levelOf(source) ? null : 'upwards'
}

/** The op whose stem begins a file's name, as hstu_attention does that of hstu_attention_bwd.cu; the longest such stem. */
const opOf = (file: string) => {
  const name = basename(file).replace(/\.\w+$/, '')
  const fits = stems.filter(stem => name === stem || name.startsWith(`${stem}_`))
  return fits.sort((a, b) => b.length - a.length)[0]
}

function mayInclude(from: string, to: string): boolean {
  if (/^csrc\/(binding|storage|readback|graphs|pages|vocabulary|devices)\.cpp$/.test(from))
    return /^csrc\/(binder|boundary|ops|page_table|check)\.h$/.test(to)
  if (from === 'test/native/fake_cuda/fake_cuda.cpp') return /^(csrc\/ops\.h|cuda\/stream\.cuh)$/.test(to)
  if (from === 'csrc/page_table.h') return to === 'csrc/hash_table.h'
  if (from === 'csrc/hash_table.h') return to === 'csrc/siphash.h'
  if (from.startsWith('test/native/page_table/'))
    return /^(csrc\/(page_table|check)|test\/native\/page_table\/\w+)\.h$/.test(to)
  if (from === 'csrc/binder.h') return /^csrc\/(boundary|ops)\.h$/.test(to)
  if (from === 'csrc/boundary.h') return /^csrc\/(storage|check)\.h$/.test(to)
  if (from === 'csrc/storage.h') return /^csrc\/(memory|tensor)\.h$/.test(to)
  if (/^csrc\/(ops|tensor|dispatch|check|math|mask)\.h$/.test(to)) return true
  // What each backend's memory offers: implemented by the backends, used by their scratch memory, chosen in memory.cpp. No op includes it.
  if (/^csrc\/(memory|block_cache)\.h$/.test(to)) return !opOf(from)
  if (/^csrc\/\w+\.(h|cpp)$/.test(from)) return to === 'csrc/page_table.h'
  const own = from.startsWith('csrc/cpu/') ? /^csrc\/cpu\/\w+\.h$/ : /^cuda\/(sm90\/)?\w+\.cuh$/
  return own.test(to) && (!opOf(to) || opOf(to) === opOf(from))
}

const libImports = under(/^lib\/.*\.ts$/).flatMap(importsOf)

describe('directions', () => {
  it('knows every part of lib', () => {
    const parts = new Set(under(/^lib\/.*\.ts$/).map(partOf))
    expect([...parts].filter(part => levelOf(part) < 0 && !leaves.includes(part))).toEqual([])
  })

  it('imports downwards', () => {
    const inside = libImports.filter(edge => edge.to.startsWith('lib/'))
    const wrong = inside.flatMap(edge => {
      const why = violation(edge)
      return why ? [`${edge.from} -> ${edge.to}: ${why}`] : []
    })
    expect(wrong).toEqual([])
  })

  it('has no cycle between the parts of a level', () => {
    const next = new Map<string, Set<string>>()
    for (const { from, to, typeOnly } of libImports) {
      if (!to.startsWith('lib/') || typeOnly || partOf(from) === partOf(to)) continue
      next.set(partOf(from), (next.get(partOf(from)) ?? new Set()).add(partOf(to)))
    }
    const reaches = (from: string, to: string, seen = new Set<string>()): boolean =>
      [...(next.get(from) ?? [])].some(part => part === to || (!seen.has(part) && reaches(part, to, seen.add(part))))
    expect([...next.keys()].filter(part => reaches(part, part))).toEqual([])
  })

  it('imports optional packages only where they are used', () => {
    const { dependencies } = JSON.parse(read('package.json')) as { dependencies: Record<string, string> }
    expect(Object.keys(dependencies)).toEqual(['node-gyp-build'])
    const outside = libImports.filter(edge => !edge.to.startsWith('lib/') && !edge.to.startsWith('node:'))
    expect(outside.filter(edge => !edge.typeOnly && !edge.dynamic).map(edge => `${edge.from} -> ${edge.to}`)).toEqual(
      [],
    )
  })

  it('keeps tests and benches of ops apart from the runner and from each other', () => {
    const allowed: [RegExp, RegExp][] = [
      [/^test\/ops\//, /^(#lib\/.*|test\/harness\.ts|node:assert\/strict)$/],
      [/^test\/harness\.ts$/, /^(#lib\/.*|node:.*|test\/values\.ts)$/],
      [/^test\/values\.ts$/, /^(#lib\/.*|node:.*)$/],
      [/^bench\/.*\.bench\.ts$/, /^(#lib\/.*|bench\/harness\.ts|test\/harness\.ts|node:.*)$/],
    ]
    const tested = (file: string) => /^test\/ops\/(\w+)/.exec(file)?.[1]
    const wrong = allowed.flatMap(([from, to]) =>
      under(from).flatMap(file =>
        importsOf(file)
          .filter(edge => !to.test(edge.to) && !(tested(file) && tested(file) === tested(edge.to)))
          .map(edge => `${file} -> ${edge.to}`),
      ),
    )
    expect(wrong).toEqual([])
  })

  it('includes downwards', () => {
    const wrong = under(/\.(h|cpp|cu|cuh)$/).flatMap(file => {
      const included = [...read(file).matchAll(/^\s*#\s*include\s+"(.*)"/gm)].map(match => match[1]!)
      const paths = included.map(path => normalize(join(dirname(file), path)))
      return paths.filter(to => !mayInclude(file, to)).map(to => `${file} -> ${to}`)
    })
    expect(wrong).toEqual([])
  })

  it('keeps Node-API and CUDA headers where they belong', () => {
    const including = (header: RegExp) => under(/\.(h|cpp|cu|cuh)$/).filter(file => header.test(read(file)))
    const napi = including(/#\s*include\s*<(napi|node_api|js_native_api)\.h>/)
    expect(napi).toEqual(['csrc/boundary.h'])
    const cuda = including(/#\s*include\s*[<"](cuda|cub\/|thrust\/|cute\/|cutlass|cooperative_groups|mma\.h|nv)/)
    expect(cuda.filter(file => !/^(cuda|test\/native\/fake_cuda)\//.test(file))).toEqual([])
  })
})

describe('budgets', () => {
  const budgets: [RegExp, number][] = [
    [/^cuda\/[^/]*\.cuh?$/, 500],
    [/^csrc\/cpu\/hstu_attention\.cpp$/, 500],
    [new RegExp(`^csrc/cpu/(${stems.join('|')})\\.cpp$`), 200],
    [/^lib\/ops\/.*\.ts$/, 120],
    [/^lib\/models\/.*\.ts$/, 330],
    [/^(csrc|cuda|lib|scripts|bench)\/.*\.(h|cpp|cu|cuh|ts|mjs|js)$/, 300],
    [/^test\/.*\.(h|cpp|ts|mjs)$/, 330],
    [/^(CMakeLists\.txt|\.ci\/run|CONTRIBUTING\.md)$/, 300],
  ]

  it('holds every source file to its lines', () => {
    const over = files.flatMap(file => {
      const budget = budgets.find(([pattern]) => pattern.test(file))?.[1]
      const lines = budget ? read(file).trimEnd().split('\n').length : 0
      return budget && lines > budget ? [`${file}: ${lines} lines of ${budget}`] : []
    })
    expect(over).toEqual([])
  })

  it('has no unfinished work', () => {
    const marks = new RegExp(`\\b(${['TO', 'FIX', 'XX'].map((a, i) => a + ['DO', 'ME', 'X'][i]).join('|')})\\b`)
    expect(under(/^(csrc|cuda|lib|scripts|bench|test)\//).filter(file => marks.test(read(file)))).toEqual([])
  })
})

describe('publication', () => {
  it('names no machine', () => {
    const text = files.filter(file => !/\.(png|svg|ico|node|safetensors|parquet)$/.test(file))
    const wrong = text.flatMap(file => {
      const patterns: [string, RegExp][] = [['a path of one machine', /(?<![\w.~}])\/(work|root|home|workspace)\/\w/]]
      if (file !== '.ci/run')
        patterns.push([
          'a folder outside the repository',
          /\.\.\/shared\b|\bshared\/(anchors|spec|design|background|data)\b/,
        ])
      if (file === 'package-lock.json') patterns.push(['the host of a registry', /"resolved"|https?:\/\/[^"]*\.tgz/])
      return patterns.filter(([, pattern]) => pattern.test(read(file))).map(([what]) => `${file} names ${what}`)
    })
    expect(wrong).toEqual([])
  })

  it('gives the version of package.json on top of the changelog', () => {
    const { version } = JSON.parse(read('package.json')) as { version: string }
    expect(/^## \[(.*?)\]/m.exec(read('CHANGELOG.md'))?.[1]).toBe(version)
  })

  it('installs without scripts', () => {
    const { scripts, gypfile } = JSON.parse(read('package.json')) as {
      scripts: Record<string, string>
      gypfile: boolean
    }
    expect(gypfile).toBe(false)
    const hooks = ['preinstall', 'install', 'postinstall', 'prepare', 'preprepare', 'postprepare', 'build']
    expect(Object.keys(scripts).filter(name => hooks.includes(name))).toEqual([]) // `build` would make `prebuild` its hook
  })

  it('documents what it exports', () => {
    const config = ts.getParsedCommandLineOfConfigFile(
      join(root, 'tsconfig.json'),
      { noEmit: true },
      {
        ...ts.sys,
        onUnRecoverableConfigFileDiagnostic: () => {},
      },
    )!
    const entry = join(root, 'lib/index.ts')
    const program = ts.createProgram([entry], config.options)
    const checker = program.getTypeChecker()
    const module = checker.getSymbolAtLocation(program.getSourceFile(entry)!)!
    const told = (symbol: ts.Symbol) => symbol.getDocumentationComment(checker).length > 0
    const bare = checker.getExportsOfModule(module).filter(symbol => {
      const target = symbol.flags & ts.SymbolFlags.Alias ? checker.getAliasedSymbol(symbol) : symbol
      // The fields of an options type may say all there is to say about it.
      const fields =
        target.flags & ts.SymbolFlags.Interface ? checker.getDeclaredTypeOfSymbol(target).getProperties() : []
      return !told(target) && !fields.some(told)
    })
    expect(bare.map(symbol => symbol.name)).toEqual([])
  })

  it('throws in C++ only codes that the library declares', () => {
    const codes = [...read('csrc/check.h').matchAll(/"(ERR_HSTU_\w+)"/g)].map(match => match[1]!)
    expect(codes.length).toBeGreaterThan(0)
    expect(codes.filter(code => !read('lib/errors.ts').includes(`'${code}'`))).toEqual([])
  })
})
