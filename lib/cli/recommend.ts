import type { FilterSeen } from '../data/batch.js'
import type { SequenceDataset } from '../data/dataset.js'
import { loadItemTitles } from '../data/load.js'
import { HstuError } from '../errors.js'
import { type Recommendation, recommend } from '../eval/recommend.js'
import type { Args } from './args.js'
import { readData } from './data_source.js'
import { tensorOptions } from './device.js'
import { interruptible } from './interrupt.js'
import { count, counted, day, print, printJson, table } from './output.js'
import { matchData, openModel } from './run_folder.js'

const LAST_ACTIONS = 5

interface Answer {
  user: string
  actions: number
  last: { item: string; title?: string; time?: number }[]
  recommendations: { item: string; score: number; title?: string }[]
}

export function run(args: Args): Promise<number | undefined> {
  const ids = args.list('user')
  const k = args.integer('k', 1) ?? 10
  const time = args.integer('time')
  const filterSeen = (args.text('filter-seen') ?? 'history') as FilterSeen
  return interruptible(async signal => {
    const loaded = await openModel(args.required('checkpoint'), tensorOptions(args.text('device')))
    try {
      const items = args.text('items')
      const titles = items ? await loadItemTitles(items, { signal }) : null
      const dataset = await readData(args, signal)
      matchData(loaded, dataset)
      const users = ids.map(id => findUser(dataset, id, args.required('data')))
      const lists = recommend(loaded.model, dataset, users, {
        ...{ k, filterSeen },
        ...(time === undefined ? {} : { queryTimes: users.map(() => time) }),
      })
      const answers = users.map((user, i) => answer(dataset, user, lists[i]!, titles))
      if (args.flag('json')) printJson(answers)
      else printAnswers(answers, titles !== null)
    } finally {
      loaded.model.dispose()
    }
    return undefined
  })
}

/** @throws HstuError ERR_HSTU_INVALID_ARGUMENT that shows how ids look here. */
function findUser(dataset: SequenceDataset, id: string, path: string): number {
  const user = dataset.userIds.indexOf(id)
  if (user >= 0) return user
  const { skippedUsers, minActions } = dataset.stats
  const skipped =
    skippedUsers > 0 ? `; ${counted(skippedUsers, 'user')} with fewer than ${minActions} actions left out` : ''
  throw new HstuError(
    'ERR_HSTU_INVALID_ARGUMENT',
    `user '${id}' is not in ${path}, which has ${counted(dataset.numUsers, 'user')} such as ${dataset.userIds.slice(0, 5).join(', ')}${skipped}`,
  )
}

function answer(
  dataset: SequenceDataset,
  user: number,
  list: readonly Recommendation[],
  titles: Map<string, string> | null,
): Answer {
  const [start, end] = [dataset.offsets[user]!, dataset.offsets[user + 1]!]
  const named = (item: string) => ({ item, ...(titles?.has(item) ? { title: titles.get(item)! } : {}) })
  const last = []
  for (let row = end - 1; row >= Math.max(start, end - LAST_ACTIONS); row--) {
    const item = named(dataset.itemIds[dataset.items[row]!]!)
    last.push(dataset.times ? { ...item, time: Number(dataset.times[row]) } : item)
  }
  return {
    user: dataset.userIds[user]!,
    actions: end - start,
    last,
    recommendations: list.map(({ itemId, score }) => ({ ...named(itemId), score })),
  }
}

function printAnswers(answers: readonly Answer[], titled: boolean): void {
  answers.forEach(({ user, actions, last, recommendations }, n) => {
    if (n > 0) print()
    print(`user ${user}: ${counted(actions, 'action')}, the latest first:`)
    for (const { item, title, time } of last)
      print(`  ${time === undefined ? '' : `${day(time)}  `}${item}${title ? `  ${title}` : ''}`)
    if (actions > last.length) print(`  ... and ${count(actions - last.length)} before`)
    print()
    const rows = recommendations.map(({ item, score, title }, i) => {
      return [String(i + 1), item, score.toFixed(4), ...(titled ? [title ?? ''] : [])]
    })
    print(table(['#', 'item', 'score', ...(titled ? ['title'] : [])], rows, [1, 3]))
  })
}
