import type { SequenceDataset } from '#lib/data/dataset.js'
import type { ModelSpec } from '#lib/models/create.js'
import { Random } from '#lib/random.js'
import type { TrainEvent, Trainer } from '#lib/train/trainer.js'

/** A small dataset with something to learn: the next item is mostly the last one plus one. */
export function toyDataset(users = 40, items = 20, seed = 1): SequenceDataset {
  const random = new Random(seed)
  const rows: number[] = []
  const times: bigint[] = []
  const offsets = [0]
  for (let u = 0; u < users; u++) {
    let item = random.int(items)
    let time = 1_000_000n + BigInt(random.int(1000))
    for (let n = 3 + random.int(12); n > 0; n--) {
      item = random.float() < 0.8 ? (item + 1) % items : random.int(items)
      time += BigInt(1 + random.int(5000))
      rows.push(item + 1)
      times.push(time)
    }
    offsets.push(rows.length)
  }
  return {
    name: 'toy',
    numUsers: users,
    numItems: items,
    userIds: Array.from({ length: users }, (_, u) => `u${u}`),
    itemIds: ['', ...Array.from({ length: items }, (_, i) => `i${i + 1}`)],
    offsets: Int32Array.from(offsets),
    items: Int32Array.from(rows),
    times: BigInt64Array.from(times),
    ratings: null,
    stats: { rows: rows.length, skippedUsers: 0, skippedActions: 0, outOfOrder: 0, minActions: 3, warnings: [] },
  }
}

export const toyModel: ModelSpec = {
  kind: 'hstu',
  config: {
    ...{ numItems: 20, dim: 16, layers: 2, heads: 2, qkDim: 8, vDim: 8, maxLength: 10, paddedLength: 12 },
    ...{ inputDropout: 0.1, linearDropout: 0.1 },
  },
}

/** All events of a run, which is aborted at the event of step `stopAfter`. */
export async function events(trainer: Trainer, stopAfter = Infinity): Promise<TrainEvent[]> {
  const controller = new AbortController()
  const list: TrainEvent[] = []
  for await (const event of trainer.run({ signal: controller.signal })) {
    list.push(event)
    if (event.type === 'step' && event.step >= stopAfter) controller.abort()
  }
  return list
}

/** Parameters and moments. */
export const bits = (trainer: Trainer) =>
  [trainer.model.parameters, trainer.optimizer.m, trainer.optimizer.v].flatMap(group => {
    return Object.entries(group).map(([name, tensor]) => [name, tensor.dataSync()] as const)
  })

/** Number, loss and learning rate of each step that was told of. */
export const steps = (list: TrainEvent[]) =>
  list.flatMap(event => (event.type === 'step' ? [[event.step, event.loss, event.lr]] : []))
