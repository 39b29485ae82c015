import { once } from 'node:events'
import { createWriteStream } from 'node:fs'
import { finished } from 'node:stream/promises'
import { check } from '../../errors.js'
import { Random } from '../../random.js'
import { throwIfAborted } from '../files.js'
import type { RequestMapping } from './mapping.js'

export interface SyntheticLogOptions {
  /** Default 2,000; half of them are there at the start. */
  users?: number
  /** Default 5,000; 40 % of them are there at the start. */
  items?: number
  categories?: number
  /** Days of the stream; default 40. */
  days?: number
  /** Items drawn a request, those drawn twice shown once; default 10. */
  candidates?: number
  seed?: number | string
  signal?: AbortSignal
  onProgress?: (day: number, days: number) => void
}

/** What was written, and how well the generator itself would have predicted it. */
export interface SyntheticLog {
  rows: number
  requests: number
  /** NE of the true probabilities of LIKE on the requests of the last fifth of the days: what no model goes below. */
  oracleNe: number
}

const DAY = 86_400
const START = 1_600_041_600 // a Monday at midnight, UTC
const FAVOURITES = 4
const ACTIVE = 0.7
const RELEASED_AT_START = 0.4

/**
 * A log of impressions whose vocabulary grows and whose preferences drift.
 *
 * Every day each user makes a request with probability .7. A candidate's category is one that the user saw before, in
 * proportion to how often (a Polya urn), or one of four favourites; its item is uniform among those of the category
 * released so far. The logit of LIKE is the sum of the item's quality, the user's mood and the user's taste for the
 * category, which swings by a cosine with a period and phase of its own: the past tells the phase. SHARE goes with some
 * LIKEs. Watch seconds grow with the same logit. The user's language changes now and then.
 *
 * The same options give the same bytes on every host.
 */
export async function writeSyntheticLog(path: string, options: SyntheticLogOptions = {}): Promise<SyntheticLog> {
  const { users = 2000, items = 5000, categories = 50, days = 40, candidates = 10, seed = 1 } = options
  for (const [name, value] of Object.entries({ users, items, categories, days, candidates }))
    check(Number.isInteger(value) && value > 0, 'ERR_HSTU_INVALID_ARGUMENT', () => {
      return `${name} must be a positive integer, got ${value}`
    })
  check(
    items * RELEASED_AT_START >= categories && categories >= FAVOURITES && days >= 5,
    'ERR_HSTU_INVALID_ARGUMENT',
    () => {
      return `items must be at least 2.5 categories, categories at least ${FAVOURITES}, days at least 5`
    },
  )
  const root = new Random(seed)
  const qualities = root.fork('items')
  const quality = Float64Array.from({ length: items }, () => 0.8 * qualities.normal())
  const people = Array.from({ length: users }, (_, u) => person(root.fork(`user ${u}`), categories))
  const random = root.fork('stream')
  const file = createWriteStream(path)
  const done = finished(file)
  file.write('request,user,item,time,like,share,watch,country,language\n')
  const total = { rows: 0, requests: 0, entropy: 0, likes: 0, counted: 0 }
  try {
    for (let day = 0; day < days; day++) {
      throwIfAborted(options.signal)
      options.onProgress?.(day, days)
      const released = Math.floor(items * (RELEASED_AT_START + ((1 - RELEASED_AT_START) * day) / (days - 1)))
      const present = Math.ceil(users * Math.min(1, 0.5 + day / days))
      // Requests of a day come in the order of their users, at times that grow with them.
      for (let u = 0; u < present; u++) {
        if (random.float() >= ACTIVE) continue
        const text = request(people[u]!, u, day)
        if (!file.write(text)) await Promise.race([once(file, 'drain'), done])
      }

      function request(user: Person, u: number, today: number): string {
        const time = START + today * DAY + Math.floor(((u + random.float()) / users) * DAY)
        if (random.float() < 0.02) user.language = random.int(8)
        const lines: string[] = []
        const id = `r${total.requests++}`
        const shown = new Set<number>()
        for (let draw = 0; draw < candidates; draw++) {
          const { category, taste } = user.choose(random, today)
          // Item i is of category i mod C.
          const item = category + categories * random.int(Math.ceil((released - category) / categories))
          if (shown.has(item)) continue
          shown.add(item)
          const logit = -1.2 + quality[item]! + user.mood + taste
          const like = Number(random.float() < 1 / (1 + Math.exp(-logit)))
          const share = like * Number(random.float() < 0.15)
          const watch = Math.exp(2.5 + 0.6 * logit + 0.5 * random.normal()).toFixed(1)
          const row = [id, `u${u}`, `i${item}`, time, like, share, watch, `c${user.country}`, `l${user.language}`]
          lines.push(`${row.join(',')}\n`)
          if (today < days * 0.8) continue
          total.entropy += Math.max(logit, 0) - logit * like + Math.log1p(Math.exp(-Math.abs(logit)))
          total.likes += like
          total.counted++
        }
        total.rows += lines.length
        return lines.join('')
      }
    }
    file.end()
    await done
  } catch (error) {
    file.destroy()
    await done.catch(() => {})
    throw error
  }
  const rate = total.likes / total.counted
  const entropy = -(rate * Math.log(rate) + (1 - rate) * Math.log(1 - rate))
  return { rows: total.rows, requests: total.requests, oracleNe: total.entropy / total.counted / entropy }
}

interface Person {
  mood: number
  country: number
  language: number
  choose: (random: Random, day: number) => { category: number; taste: number }
}

function person(random: Random, categories: number): Person {
  const order = random.shuffle(Array.from({ length: categories }, (_, c) => c)).slice(0, FAVOURITES)
  const [period, phases] = [20 + 20 * random.float(), order.map(() => 2 * Math.PI * random.float())]
  const concentration = 1 + 49 * random.float()
  const seen: number[] = []
  return {
    mood: 0.7 * random.normal(),
    country: random.int(20),
    language: random.int(8),
    choose(stream, day) {
      const fresh = stream.float() * (concentration + seen.length) < concentration
      const local = fresh ? stream.int(FAVOURITES) : seen[stream.int(seen.length)]!
      if (seen.length < 64) seen.push(local)
      else seen[stream.int(64)] = local
      return { category: order[local]!, taste: 1.8 * Math.cos((2 * Math.PI * day) / period + phases[local]!) }
    },
  }
}

/** What the columns of {@link writeSyntheticLog} are. */
export const syntheticMapping = (path: string): RequestMapping => ({
  name: 'synthetic',
  sources: [
    {
      ...{ path, format: 'csv', user: 'user', item: 'item', time: 'time', request: 'request' },
      actions: {
        VIEW: true,
        LIKE: { column: 'like', equals: '1' },
        SHARE: { column: 'share', equals: '1' },
        LONG: { column: 'watch', atLeast: 30 },
      },
      values: { watch: 'watch' },
      contextual: { country: 'country' },
      series: { language: 'language' },
    },
  ],
  tasks: ['like = LIKE', 'share = SHARE', 'long = watch >= 30 s'],
})
