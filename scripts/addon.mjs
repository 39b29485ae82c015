// What is asked of the addon that users install, read from the file itself: where it loads, what it exports, which GPUs it has code for.
import { execFileSync } from 'node:child_process'
import { readFileSync } from 'node:fs'

/** GPU images of a release, as CMake names them: code for A100, A10 and RTX 30, L4 and RTX 40, H100 and H200; PTX for what comes later. */
export const releaseArchitectures = '80-real;86-real;89-real;90a-real;80-virtual'

/** Options of `npm run prebuild` and of check-prebuild.mjs: what the addon is to hold. */
export const prebuildOptions = {
  architectures: { type: 'string', default: releaseArchitectures },
  'cpu-only': { type: 'boolean', default: false },
}

// RHEL 9, Amazon Linux 2023: glibc 2.34 and the libraries of GCC 11.
const newest = { GLIBC: '2.34', GLIBCXX: '3.4.29', CXXABI: '1.3.13', GCC: '11.0.0' }
const libraries = /^(libstdc\+\+\.so\.6|lib(m|c|pthread|dl|rt)\.so\.\d+|libgcc_s\.so\.1|ld-linux-x86-64\.so\.2)$/
const entries = ['napi_register_module_v1', 'node_api_module_get_api_version_v1']

/** `80-real;90a` as the images of the addon: code is sm_80, PTX is compute_80, and a bare number is both. */
export function imagesOf(architectures) {
  const images = architectures.split(/[;,]/).flatMap(text => {
    const [, number, kind] = /^(\d+[af]?)(-real|-virtual)?$/.exec(text.trim()) ?? []
    if (!number) throw new Error(`'${text}' is no architecture: 80-real;90a-real;80-virtual is a list of them`)
    return [...(kind === '-virtual' ? [] : [`sm_${number}`]), ...(kind === '-real' ? [] : [`compute_${number}`])]
  })
  return [...new Set(images)].sort()
}

/** What the options ask for; `fail` is told of what cannot be read. */
export function imagesWanted(options, fail) {
  try {
    return options['cpu-only'] ? [] : imagesOf(options.architectures)
  } catch (error) {
    return fail(error.message)
  }
}

function tool(command, ...args) {
  return execFileSync(command, args, { encoding: 'utf8', maxBuffer: 1 << 26 })
}

/** Whether version a is later than b; both of numbers and dots. */
function later(a, b) {
  const [x, y] = [a, b].map(version => version.split('.').map(Number))
  const i = x.findIndex((part, at) => part !== (y[at] ?? 0))
  return i >= 0 && x[i] > (y[i] ?? 0)
}

/** The images of each fat binary in .nv_fatbin, from their headers: the payload is compressed, the architecture stands in the clear. */
function fatbins(file, sections) {
  const [, offset, size] = /\.nv_fatbin +PROGBITS +\w+ (\w+) (\w+)/.exec(sections) ?? []
  if (!offset) return []
  const data = readFileSync(file).subarray(
    Number.parseInt(offset, 16),
    Number.parseInt(offset, 16) + Number.parseInt(size, 16),
  )
  const found = []
  for (let at = 0; at + 16 <= data.length; ) {
    if (data.readUInt32LE(at) !== 0xba55ed50) {
      at += 8
      continue
    }
    const end = at + data.readUInt16LE(at + 6) + Number(data.readBigUInt64LE(at + 8))
    const images = []
    for (let image = at + data.readUInt16LE(at + 6); image < end; ) {
      const kind = data.readUInt16LE(image)
      const flags = data.readUInt32LE(image + 40)
      const suffix = flags & 0x100000 ? 'a' : flags & 0x200000 ? 'f' : ''
      images.push(`${{ 1: 'compute', 2: 'sm' }[kind] ?? `kind ${kind}`}_${data.readUInt32LE(image + 28)}${suffix}`)
      image += data.readUInt32LE(image + 4) + Number(data.readBigUInt64LE(image + 8))
    }
    found.push(images.sort())
    at = end
  }
  return found
}

/** The images that cuobjdump lists; null where the CUDA toolkit of this host has none. */
function listed(file) {
  try {
    const elf = [...tool('cuobjdump', '--list-elf', file).matchAll(/\.(sm_\w+)\.cubin/g)].map(match => match[1])
    const ptx = [...tool('cuobjdump', '--list-ptx', file).matchAll(/\.sm_(\w+)\.ptx/g)].map(
      match => `compute_${match[1]}`,
    )
    return [...new Set([...elf, ...ptx])].sort()
  } catch (error) {
    if (error.code === 'ENOENT') return null
    throw error
  }
}

/** The facts of an addon, and `problems`: one line for each thing that a user would trip over. `wanted` is what imagesOf gives. */
export function inspect(file, wanted) {
  const [dynamic, symbols, sections] = [
    tool('objdump', '-p', file),
    tool('objdump', '-T', file),
    tool('readelf', '-SW', file),
  ]
  const problems = []

  const needed = [...dynamic.matchAll(/NEEDED +(\S+)/g)].map(match => match[1])
  for (const name of needed.filter(name => !libraries.test(name)))
    problems.push(`needs ${name}, which a host may lack: only the C and C++ run-time libraries may be needed`)

  const references = dynamic.slice(dynamic.indexOf('Version References:'))
  const highest = {}
  let library = ''
  for (const [, from, version] of references.matchAll(/required from (\S+):|0x\w+ 0x\w+ \d+ (\S+)/g)) {
    if (from) library = from
    else {
      const [, name, number] = /^([A-Z]+)_([\d.]+)$/.exec(version) ?? []
      const limit = newest[name]
      if (!limit || later(number, limit)) {
        const users = symbols
          .split('\n')
          .filter(line => line.includes(`(${version})`))
          .map(line => line.split(/\s+/).at(-1))
        problems.push(
          `needs ${version} of ${library} (for ${users.join(', ')}): ${limit ? `at most ${name}_${limit}` : 'an unknown version'}`,
        )
      }
      if (name && (!highest[name] || later(number, highest[name]))) highest[name] = number
    }
  }

  const defined = symbols.split('\n').filter(line => /^[0-9a-f]+ /.test(line) && !line.includes('*UND*'))
  const exported = defined.map(line => line.split(/\s+/).at(-1)).sort()
  if (exported.join() !== entries.join())
    problems.push(`exports ${exported.join(', ') || 'nothing'} instead of ${entries.join(', ')}`)
  if (/ \.(debug_\w+|symtab) /.test(sections)) problems.push('is not stripped')

  const binaries = fatbins(file, sections)
  const images = [...new Set(binaries.flat())].sort()
  if (wanted) {
    if (images.join() !== wanted.join())
      problems.push(
        `holds GPU code for ${images.join(', ') || 'no architecture'} instead of ${wanted.join(', ') || 'none'}`,
      )
    const partial = binaries.filter(binary => binary.join() !== images.join())
    if (partial.length > 0)
      problems.push(
        `${partial.length} of ${binaries.length} CUDA sources lack an architecture: ${partial[0].join(', ')}`,
      )
  }
  const told = listed(file)
  if (told && told.join() !== images.join())
    problems.push(`cuobjdump lists ${told.join(', ')}, the headers say ${images.join(', ')}`)
  return { needed, highest, images, problems }
}
