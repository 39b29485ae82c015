import { native } from '#lib/native.js'
import { add } from '#lib/ops/add.js'
import { memory, scope, Tensor } from '#lib/tensor.js'
import { buildFakeCuda, onEachCuda } from './fake_cuda.js'
import { runFixture } from './process.js'

beforeAll(buildFakeCuda, 600_000)

const { usable, reason } = native.backend().cuda
const onCuda = (name: string, fn: () => unknown) =>
  usable ? it(name, fn) : it.skip(`${name}: NOT RUN (${reason})`, () => {})

// What the CPU checks in every call, CUDA checks under HSTU_DEBUG=1: the op, the argument, the position and the value are named.
const wanted = {
  embedding: /^ERR_HSTU_INVALID_ARGUMENT embedding: ids\[2\] = 5 is outside 0..4/,
  negative: /^ERR_HSTU_INVALID_ARGUMENT embedding: ids\[1\] = -1 is outside 0..4/,
  position: /^ERR_HSTU_INVALID_ARGUMENT position_embedding: sequence 1 has 5 rows, table has 4/,
  softmax: /^ERR_HSTU_INVALID_ARGUMENT softmax_loss: positive_ids\[1\] = 9 /,
  softmaxWeighted: /^ERR_HSTU_INVALID_ARGUMENT softmax_loss: positive_ids\[2\] = 7 /,
  sampled: /^ERR_HSTU_INVALID_ARGUMENT sampled_softmax_loss: positive_ids\[1\] = 6 /,
  sampledWeighted: /^ERR_HSTU_INVALID_ARGUMENT sampled_softmax_loss: positive_ids\[1\] = 6 /,
  negatives: /^ERR_HSTU_INVALID_ARGUMENT sampled_softmax_loss: negative_ids\[(0, )?2\] = 5 /,
  page: /^ERR_HSTU_INVALID_ARGUMENT kv_append: page_table\[1\] = 4 of sequence 0 is outside 0..3/,
  fewPages: /^ERR_HSTU_INVALID_ARGUMENT kv_append: sequence 0 has 2 pages, but 5 tokens take 3 of 2 slots/,
  pageTwice: /^ERR_HSTU_INVALID_ARGUMENT kv_append: page 3 would be written twice, by sequences 0 and 0/,
  fewTokens: /^ERR_HSTU_INVALID_ARGUMENT kv_gather: 3 rows of sequence 0 are asked for, kv_lengths has 2/,
  sum: /^ERR_HSTU_INVALID_ARGUMENT embedding_sum: ids\[1\]\[1\] = 3 is outside -1..2/,
  multiHot: /^ERR_HSTU_INVALID_ARGUMENT multi_hot_embedding: actions\[1\] = 8 has a bit at or above the table's 3 rows/,
  notKnown: /^ERR_HSTU_INVALID_ARGUMENT multi_hot_embedding: actions\[1\] = -1 is negative \(not known\)/,
  adagrad: /^ERR_HSTU_INVALID_ARGUMENT rowwise_adagrad: ids\[1\] = 5 is outside 0..4/,
  lengths: /^ERR_HSTU_INVALID_ARGUMENT cumsum: lengths\[1\] = -1 is negative/,
  backwards: /^ERR_HSTU_INVALID_ARGUMENT expand: sequence 1 has a negative length: offsets\[1\] = 3, offsets\[2\] = 2/,
  rows: /^ERR_HSTU_INVALID_ARGUMENT expand: offsets ends with 2 after sequence 1, but there are 3 rows/,
  keys: /^ERR_HSTU_INVALID_ARGUMENT hash_lookup: 4 keys might be new, but 3 of 4 rows are free/,
  attentionLength: /^ERR_HSTU_INVALID_ARGUMENT hstu_attention: sequence 1 has 3 keys, max_seq_len is 2/,
  attentionTargets: /^ERR_HSTU_INVALID_ARGUMENT hstu_attention: sequence 1 has 4 targets but 3 keys/,
  attentionQueries: /^ERR_HSTU_INVALID_ARGUMENT hstu_attention: sequence 0 has 3 queries but only 2 keys/,
  rank: /^ERR_HSTU_INVALID_ARGUMENT target_rank: target_ids\[1\] = 5 /,
}

describe('ids out of range', () => {
  const row = (device: string, env: Record<string, string>) => async () => {
    const { code, signal, stdout, stderr } = await runFixture('bad_input.mjs', [device], env)
    expect({ code, signal }, stderr).toEqual({ code: 0, signal: null })
    const { thrown, after } = JSON.parse(stdout) as { thrown: Record<string, string>; after: number[] }
    for (const [name, message] of Object.entries(wanted)) expect(thrown[name], name).toMatch(message)
    expect(after).toEqual([1, 1])
  }
  it('are named on the CPU', row('cpu', {}))
  onCuda('are named on CUDA under HSTU_DEBUG=1', row('cuda:0', { HSTU_DEBUG: '1' }))
})

describe('devices', () => {
  const failing = (fn: () => unknown, code: RegExp, message: RegExp) =>
    expect(() => scope(fn)).toThrow(
      expect.objectContaining({ code: expect.stringMatching(code), message: expect.stringMatching(message) }),
    )

  it.skipIf(usable)("'cuda' where there is none throws with the reason, and never falls back", () => {
    const code = /^ERR_HSTU_(CUDA_UNAVAILABLE|DRIVER_TOO_OLD)$/
    for (const fn of [() => Tensor.zeros([1], { device: 'cuda' }), () => Tensor.from([1], [1], { device: 'cuda:0' })])
      failing(fn, code, new RegExp(`device cuda:0 is unavailable: ${reason}`))
    failing(() => memory('cuda'), code, /device cuda:0 is unavailable/)
  })

  onCuda('a number that is not there is named', () => {
    failing(
      () => Tensor.zeros([1], { device: 'cuda:99' }),
      /CUDA_UNAVAILABLE/,
      /there is no device cuda:99; this host has \d+/,
    )
  })

  onCuda('two of them in one op are named', () => {
    failing(
      () => add(Tensor.zeros([2], { device: 'cuda' }), Tensor.zeros([2])),
      /^ERR_HSTU_DEVICE$/,
      /^add: b is on cpu, y is on cuda:0$/,
    )
  })

  onEachCuda('tensors of two devices in one op, and a tensor too large', async run => {
    const { code, stdout, stderr } = await run('devices.mjs')
    expect(code, stderr).toBe(0)
    const { peak, ...rest } = JSON.parse(stdout)
    expect(peak).toBeLessThan(2 ** 20)
    expect(rest).toEqual({
      mixed: 'ERR_HSTU_DEVICE add: b is on cpu, y is on cuda:0',
      large: expect.stringMatching(
        /^ERR_HSTU_OUT_OF_MEMORY float32\[1048576, 1048576\] of 4398046511104 bytes: out of memory on cuda:0: 4398046511104 bytes requested, \d+ free of \d+$/,
      ),
      after: [2, 2],
    })
  })
})
