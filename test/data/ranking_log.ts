// A small log of requests: its columns, its mapping, and what is prepared from it.
import type { RequestMapping } from '#lib/data/ranking/mapping.js'
import { prepareRequests } from '#lib/data/ranking/prepare.js'
import { RequestReader } from '#lib/data/ranking/reader.js'

export const header = 'req,user,item,time,event,watch,country,lang'

/** Prepares a log into the folder `out`, and opens it. */
export async function prepared(mapping: RequestMapping, out: string): Promise<RequestReader> {
  await prepareRequests(mapping, { out })
  return RequestReader.open(out)
}

export const mappingOf = (path: string, more: Partial<RequestMapping> = {}): RequestMapping => ({
  name: 'tiny',
  sources: [
    {
      ...{ path, user: 'user', item: 'item', time: 'time', request: 'req' },
      impression: { column: 'event', equals: 'VIEW' },
      actions: {
        VIEW: { column: 'event', equals: 'VIEW' },
        LIKE: { column: 'event', equals: 'LIKE' },
        LONG: { column: 'watch', atLeast: 30 },
      },
      values: { watch: 'watch' },
      contextual: { country: 'country' },
      series: { lang: 'lang' },
    },
  ],
  tasks: ['like = LIKE once', 'long = watch >= 0.5 min', 'watch_time = watch'],
  ...more,
})
