// The checks of a release find what they are for.
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { imagesOf, inspect, root, run } from './project.js'

let folder: string
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'hstu-checks-'))
})
afterAll(() => rmSync(folder, { recursive: true }))

describe('addon', () => {
  it('is named by its architectures', () => {
    expect(imagesOf('80-real;90a-real;80-virtual')).toEqual(['compute_80', 'sm_80', 'sm_90a'])
    expect(imagesOf('80,86-real')).toEqual(['compute_80', 'sm_80', 'sm_86'])
    expect(() => imagesOf('sm_80')).toThrow(/'sm_80' is no architecture/)
  })

  it('is refused with the library, the version, the export and the architecture that are wrong', () => {
    const library = (name: string, symbol: string, version: string) => {
      writeFileSync(join(folder, `${symbol}.cpp`), `extern "C" void ${symbol}() {}\n`)
      writeFileSync(join(folder, `${symbol}.map`), `${version} { global: ${symbol}; };\n`)
      const link = [`-Wl,-soname,${name}`, `-Wl,--version-script=${symbol}.map`]
      run('c++', ['-shared', '-fPIC', '-nostdlib', ...link, '-o', name, `${symbol}.cpp`], folder)
    }
    library('libcudart.so.13', 'cuda_call', 'libcudart.so.13')
    library('libm.so.6', 'new_call', 'GLIBC_2.99')
    library('libstdc++.so.6', 'newer_call', 'GLIBCXX_3.4.30')
    const calls = ['cuda_call', 'new_call', 'newer_call']
    const text = `extern "C" { ${calls.map(call => `void ${call}();`).join(' ')} void stray() { ${calls.join('(); ')}(); } }\n`
    writeFileSync(join(folder, 'bad.cpp'), text)
    const libraries = ['libcudart.so.13', 'libm.so.6', 'libstdc++.so.6'].map(name => `-l:${name}`)
    run('c++', ['-shared', '-fPIC', '-g', '-nostdlib', '-o', 'bad.node', 'bad.cpp', '-L.', ...libraries], folder)
    const { problems } = inspect(join(folder, 'bad.node'), ['sm_80'])
    for (const expected of [
      /^needs libcudart\.so\.13, which a host may lack/,
      /^needs GLIBC_2\.99 of libm\.so\.6 \(for new_call\): at most GLIBC_2\.34/,
      /^needs GLIBCXX_3\.4\.30 of libstdc\+\+\.so\.6 \(for newer_call\): at most GLIBCXX_3\.4\.29/,
      /^exports stray instead of napi_register_module_v1/,
      /^is not stripped/,
      /^holds GPU code for no architecture instead of sm_80/,
    ])
      expect(problems.filter(problem => expected.test(problem))).toHaveLength(1)
  })
})

describe('spills', () => {
  const sources = readdirSync(join(root, 'cuda')).filter(name => name.endsWith('.cu'))
  const budget = () => join(folder, 'spills.json')
  const check = (...more: string[]) =>
    run(
      process.execPath,
      [join(root, 'scripts/check-spills.mjs'), '--build', folder, '--budget', budget(), ...more],
      root,
    )

  /** What ptxas says of hstu::cuda::(anonymous namespace)::k<float, 64>(float*). */
  const log = (architecture: string, stores: number, loads: number) =>
    `ptxas info    : Compiling entry function '_ZN4hstu4cuda12_GLOBAL__N_11kIfLi64EEEvPT_' for '${architecture}'\n` +
    `ptxas info    : Function properties for _ZN4hstu4cuda12_GLOBAL__N_11kIfLi64EEEvPT_\n` +
    `    16 bytes stack frame, ${stores} bytes spill stores, ${loads} bytes spill loads\n`

  /** Logs as a build leaves them: every source has one, `text` is the last one's. */
  function build(text: string) {
    const logs = join(folder, 'CMakeFiles/hstu.dir/cuda')
    mkdirSync(logs, { recursive: true })
    for (const source of sources) writeFileSync(join(logs, `${source}.o.ptxas`), source === sources.at(-1) ? text : '')
  }
  const kernel = `${sources.at(-1)!.slice(0, -3)}/k`

  it('over the budget fail, by kernel and architecture', () => {
    build(log('sm_80', 4, 8) + log('sm_90a', 0, 0))
    writeFileSync(budget(), '{}\n')
    expect(() => check()).toThrow(`${kernel} on sm_80 spills 8 bytes, 0 allowed: `)
    writeFileSync(budget(), JSON.stringify({ [kernel]: { sm_80: 7 } }))
    expect(() => check()).toThrow(`${kernel} on sm_80 spills 8 bytes, 7 allowed: `)
    writeFileSync(budget(), JSON.stringify({ [kernel]: { sm_80: 8 } }))
    expect(check()).toContain('1 kernels (2 instances) on sm_80, sm_90a stay within')
  })

  it('are written by --update, less the kernels that are gone, and with the architectures of other builds', () => {
    build(log('sm_80', 4, 8) + log('sm_90a', 0, 0))
    writeFileSync(budget(), JSON.stringify({ [kernel]: { sm_80: 9, sm_89: 3, sm_90a: 5 }, 'gone/k': { sm_80: 1 } }))
    const told = check()
    expect(told).toContain('gone/k is gone')
    expect(told).toContain(`${kernel} on sm_90a spills 0 bytes, 5 allowed`)
    check('--update')
    expect(JSON.parse(readFileSync(budget(), 'utf8'))).toEqual({ [kernel]: { sm_80: 8, sm_89: 3 } })
    expect(check()).not.toContain('--update')
  })

  it('fail where wgmma was serialised, and where nothing was compiled', () => {
    const loss = "Potential Performance Loss: wgmma.mma_async instructions are serialized in the function 'k'"
    build(`ptxas info    : (C7511) ${loss}\n${log('sm_90a', 0, 0)}`)
    expect(() => check()).toThrow(loss)
    build('')
    expect(() => check()).toThrow('ptxas said nothing of any kernel')
    rmSync(join(folder, 'CMakeFiles'), { recursive: true })
    expect(() => check()).toThrow(/holds nothing of .*\.cu: npm run build:cuda/)
  })
})
