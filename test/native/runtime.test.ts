import { mkdtempSync, readFileSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { native } from '#lib/native.js'
import { Tensor } from '#lib/tensor.js'
import { buildFakeCuda, hasFakeCuda, onEachCuda, onFakeCuda } from './fake_cuda.js'
import type { Ended } from './process.js'

beforeAll(buildFakeCuda, 600_000)

const late = { FAKE_CUDA_DELAY_MS: '2' }
const printed = ({ code, signal, stdout, stderr }: Ended) => {
  expect({ code, signal, stderr }).toEqual({ code: 0, signal: null, stderr: '' })
  return JSON.parse(stdout)
}

describe('data()', () => {
  onEachCuda('resolves with the values of the call, in any order of dispose and write', async run => {
    const { ticked, ...rest } = printed(await run('reads.mjs', ['values'], late))
    const values = [[41, 82, 123], [1, 2, 3], [], [String(2n ** 62n), '-1'], [7, 7, 7]]
    expect(rest).toEqual({ values, right: true, same: true })
    if (run === onFakeCuda) expect(ticked).toBe(true) // the event loop ran meanwhile
  })

  onEachCuda('settles many reads', async run => {
    const wanted = Array.from({ length: 200 }, (_, i) => 0.5 * (2 + Math.floor(i / 10)))
    expect(printed(await run('reads.mjs', ['many']))).toEqual(wanted)
  })

  onEachCuda('keeps the process alive until it is settled, and no longer', async run => {
    expect(printed(await run('reads.mjs', ['alive'], late))).toBe(41)
  })

  onEachCuda('rejects for a disposed tensor', async run => {
    expect(printed(await run('reads.mjs', ['refused']))).toBe('HstuError ERR_HSTU_DISPOSED')
  })

  onEachCuda('lets a process end with reads in flight', async run => {
    for (const [mode, wanted] of [['exit', 7] as const, ['throw', 1] as const])
      for (let round = 0; round < 3; round++) {
        const { code, signal, stderr } = await run('reads.mjs', [mode], late)
        expect({ code, signal }, stderr).toEqual({ code: wanted, signal: null })
      }
  })

  onEachCuda('lets workers be terminated with reads in flight', async run => {
    expect(printed(await run('reads.mjs', ['terminate'], { FAKE_CUDA_DELAY_MS: '1' }))).toEqual([4])
  })

  it('goes through the same thread for tensors of the CPU', async () => {
    const x = Tensor.from([1, 2, 3])
    const reads = Array.from({ length: 50 }, () => native.read_later(x, new Float32Array(3)))
    x.write(Float32Array.of(4, 5, 6))
    x.dispose()
    for (const values of await Promise.all(reads)) expect([...values]).toEqual([1, 2, 3])
  })
})

describe('write()', () => {
  onEachCuda('does not wait for the stream where it is small', async run => {
    const log = join(mkdtempSync(join(tmpdir(), 'hstu-')), 'log')
    const { ms, right } = printed(await run('writes.mjs', ['small'], { FAKE_CUDA_DELAY_MS: '5', FAKE_CUDA_LOG: log }))
    expect(right).toBe(true)
    if (run !== onFakeCuda) return
    expect(ms).toBeLessThan(60 * 5) // the ops before the writes alone take as long
    const calls = readFileSync(log, 'utf8').split('\n')
    const firstRead = calls.indexOf('cudaStreamSynchronize')
    expect(calls.slice(0, firstRead).filter(name => name === 'cudaMemcpyAsync')).toHaveLength(601)
    expect(calls.slice(0, firstRead).filter(name => /Synchronize|HostAlloc/.test(name))).toEqual(['cudaHostAlloc'])
  })

  onEachCuda('arrives whole at every size', async run => {
    expect(printed(await run('writes.mjs', ['sizes'])).right).not.toContain(false)
  })

  onEachCuda('goes around the ring in the order of the stream', async run => {
    expect(printed(await run('writes.mjs', ['around'], { FAKE_CUDA_DELAY_MS: '1' }))).toEqual({ right: true })
  })
})

describe.skipIf(!hasFakeCuda)('a device that cannot be used', () => {
  const none = 'ERR_HSTU_CUDA_UNAVAILABLE'
  it.each([
    ['no driver', { FAKE_CUDA_DRIVER: '0' }, '', none, 'no NVIDIA driver was found on this host'],
    [
      ...([
        'a driver too old',
        { FAKE_CUDA_DRIVER: '12040' },
        'cudaGetDeviceCount=35',
        'ERR_HSTU_DRIVER_TOO_OLD',
      ] as const),
      'the NVIDIA driver supports CUDA 12.4, this build needs 13.0 (driver 580 or later)',
    ],
    ['no device', { FAKE_CUDA_DEVICES: '0' }, '', none, 'the driver reports no CUDA device'],
    ['a driver that fails', {}, 'cudaGetDeviceCount=999', none, 'the driver reports: status 999'],
    ['no kernels', {}, 'cudaFuncGetAttributes=209', none, 'this build holds no kernels for Fake (SM 9.0): status 209'],
  ] as const)('is told of with the reason, and the CPU works: %s', async (_, more, failing, code, reason) => {
    const file = join(mkdtempSync(join(tmpdir(), 'hstu-')), 'fail')
    writeFileSync(file, failing)
    const told = printed(await onFakeCuda('discovery.mjs', [], { FAKE_CUDA_FAIL: file, ...more }))
    expect(told).toEqual({
      ...{ usable: false, reason, thrown: `${code} device cuda:0 is unavailable: ${reason}`, cpu: [3] },
    })
  })
})

describe.skipIf(!hasFakeCuda)('a lost device', () => {
  // CUDA's 700 is an illegal address: the context is gone. The fake runtime recovers at once; the library must not.
  it.each([
    ['data', 'cudaEventSynchronize'],
    ['data', 'cudaMemcpyAsync'],
    ['dataSync', 'cudaStreamSynchronize'],
    ['write', 'cudaMemcpyAsync'],
    ['op', 'launch'],
    ['create', 'cudaMallocAsync'],
  ])('is found by %s (%s) and every later call says so', async (call, name) => {
    const file = join(mkdtempSync(join(tmpdir(), 'hstu-')), 'fail')
    writeFileSync(file, '')
    const { lost, cpu } = printed(
      await onFakeCuda('reads.mjs', ['lost', call, `${name}=700`], { FAKE_CUDA_FAIL: file }),
    )
    expect(lost).toHaveLength(6)
    for (const text of lost) {
      expect(text).toMatch(
        /^ERR_HSTU_DEVICE_LOST the CUDA device was lost; restart the process. First error: .*status 700/,
      )
      expect(text).toBe(lost[0])
    }
    expect(cpu).toEqual([3])
  })

  it('is not what an error that passes makes of it', async () => {
    const file = join(mkdtempSync(join(tmpdir(), 'hstu-')), 'fail')
    writeFileSync(file, '')
    const ended = await onFakeCuda('reads.mjs', ['lost', 'dataSync', 'cudaMemcpyAsync=1'], { FAKE_CUDA_FAIL: file })
    const [first, ...later] = printed(ended).lost
    expect(first).toMatch(/^ERR_HSTU_DEVICE .*status 1/)
    expect(later).toEqual(Array.from({ length: 5 }, () => 'resolved'))
  })
})

describe.skipIf(!hasFakeCuda)('NVTX ranges', () => {
  it('are named after ops, and end where the op throws too', async () => {
    const folder = mkdtempSync(join(tmpdir(), 'hstu-'))
    const [log, file] = [join(folder, 'log'), join(folder, 'fail')]
    writeFileSync(file, '')
    const env = { FAKE_CUDA_LOG: log, FAKE_CUDA_FAIL: file }
    const [first] = printed(await onFakeCuda('reads.mjs', ['lost', 'op', 'launch=1'], env)).lost
    expect(first).toMatch(/^ERR_HSTU_DEVICE /)
    const calls = readFileSync(log, 'utf8').split('\n')
    const ranges = calls.filter(call => /range|^launch$/.test(call))
    const one = ['range add', 'launch', 'end of range']
    expect(ranges).toEqual([...one, ...one])
  })
})
