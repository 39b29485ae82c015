import { mkdtempSync, readFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { buildFakeCuda, onEachCuda, onFakeCuda } from './fake_cuda.js'
import type { Ended } from './process.js'

beforeAll(buildFakeCuda, 600_000)

const printed = ({ code, signal, stdout, stderr }: Ended) => {
  expect({ code, signal, stderr }).toEqual({ code: 0, signal: null, stderr: '' })
  return JSON.parse(stdout)
}
const logFile = () => join(mkdtempSync(join(tmpdir(), 'hstu-')), 'log')
const count = (file: string, name: string) =>
  readFileSync(file, 'utf8')
    .split('\n')
    .filter(call => call === name).length

describe('captureGraph', () => {
  onEachCuda('replays with the inputs of the moment, in one launch', async run => {
    const log = logFile()
    const { seen, after, left, same } = printed(await run('graphs.mjs', ['replay'], { FAKE_CUDA_LOG: log }))
    expect(seen).toEqual([
      [
        [3, 6, 9],
        [1, 4, 9],
      ],
      [
        [3, 6, 9],
        [1, 4, 9],
      ],
      [
        [12, 15, 18],
        [16, 25, 36],
      ],
      [
        [147, 147, 147],
        [2401, 2401, 2401],
      ],
    ])
    expect(after).toMatch(/^ERR_HSTU_DISPOSED/)
    expect({ left, same }).toEqual({ left: [49, 49, 49], same: true })
    if (run !== onFakeCuda) return
    expect(count(log, 'cudaGraphInstantiate')).toBe(1)
    expect(count(log, 'cudaGraphLaunch')).toBe(51)
    expect(count(log, 'launch')).toBe(2 * 3 + 2) // the run before the capture, the capture, and the copy of the outputs
  })

  onEachCuda('changes in place once at the capture, and once a replay', async run => {
    expect(printed(await run('graphs.mjs', ['inPlace']))).toEqual({ equal: true, moved: true })
  })

  onEachCuda('keeps the tensors that it uses', async run => {
    const { sum, during, after } = printed(await run('graphs.mjs', ['keeps']))
    expect(sum).toEqual([11, 22])
    expect(during).toEqual({ tensors: 3, bytes: 24 })
    expect(after).toEqual({ tensors: 0, bytes: 0 })
  })

  onEachCuda("refuses what is not the device's work, and all works after it", async run => {
    const { codes, works, same } = printed(await run('graphs.mjs', ['refused']))
    const invalid = 'ERR_HSTU_INVALID_ARGUMENT'
    const host = 'the host is not possible while a CUDA graph is captured: do it before, or after a replay'
    expect(codes).toEqual({
      dataSync: `${invalid} reading a tensor to ${host}`,
      item: `${invalid} reading a tensor to ${host}`,
      write: `${invalid} writing a tensor from ${host}`,
      from: `${invalid} writing a tensor from ${host}`,
      nested: expect.stringContaining(invalid),
      graphed: expect.stringContaining(invalid),
      promise: expect.stringMatching(/^ERR_HSTU_INVALID_ARGUMENT .*promise/),
      cpu: 'ERR_HSTU_DEVICE add runs on cpu while a graph of cuda:0 is captured: it would not be part of the graph',
      throws: 'OWN its own',
      taped: expect.stringMatching(/^ERR_HSTU_INVALID_ARGUMENT captureGraph inside valueAndGrad/),
    })
    expect({ works, same }).toEqual({ works: [2, 4], same: true })
  })

  onEachCuda('refuses data() by its promise', async run => {
    const { rejected, values } = printed(await run('graphs.mjs', ['data']))
    expect(rejected).toMatch(/^ERR_HSTU_INVALID_ARGUMENT reading a tensor to the host is not possible while/)
    expect(values).toEqual([1, 2])
  })

  onEachCuda('throws where its memory does not fit the limit, and works when it does', async run => {
    const { message, size } = printed(await run('graphs.mjs', ['limit']))
    expect(message).toMatch(/^ERR_HSTU_OUT_OF_MEMORY float32\[65536\] .* free of the limit of/)
    expect(size).toBe(1 << 16)
  })
})

describe('graphed', () => {
  onEachCuda('takes the same training steps, bit for bit, in one launch each', async run => {
    const log = logFile()
    const result = printed(await run('graphs.mjs', ['training'], { FAKE_CUDA_LOG: log }))
    expect(result).toEqual({ equal: true, distinct: 10, same: true })
    if (run !== onFakeCuda) return
    expect(count(log, 'cudaGraphInstantiate')).toBe(1) // the first step runs as it is
    expect(count(log, 'cudaGraphExecUpdate')).toBe(8)
    expect(count(log, 'cudaGraphLaunch')).toBe(9)
  })

  onEachCuda('follows a function whose ops change', async run => {
    const log = logFile()
    expect(printed(await run('graphs.mjs', ['topology'], { FAKE_CUDA_LOG: log }))).toEqual([4, 4, 6, 6, 3, 4])
    if (run === onFakeCuda) expect(count(log, 'cudaGraphInstantiate')).toBe(4)
  })

  onEachCuda('gives results of their own, that outlive it', async run => {
    const seen = [2, 3, 4, 5].map(factor => [factor, factor])
    expect(printed(await run('graphs.mjs', ['results'], { FAKE_CUDA_DELAY_MS: '1' }))).toEqual({ seen, same: true })
  })

  onEachCuda('lets workers be terminated within a capture', async run => {
    expect(printed(await run('graphs.mjs', ['terminate']))).toEqual([2, 4])
  })
})
