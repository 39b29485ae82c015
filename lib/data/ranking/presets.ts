import { join } from 'node:path'
import { HstuError } from '../../errors.js'
import type { RequestMapping } from './mapping.js'

/** Public data sets as request logs; `folder` holds their files. */
const presets: Record<string, (folder: string) => RequestMapping> = {
  /** A request is a session, its candidates the articles viewed in it. */
  'ranking/deskdrop': folder => ({
    name: 'deskdrop',
    sources: [
      {
        path: join(folder, 'interactions.csv'),
        ...{ user: 'person_id', item: 'content_id', time: 'timestamp', request: 'session_id' },
        impression: { column: 'event_type', equals: 'VIEW' },
        actions: Object.fromEntries(
          Object.entries({
            VIEW: 'VIEW',
            LIKE: 'LIKE',
            BOOKMARK: 'BOOKMARK',
            COMMENT: 'COMMENT CREATED',
            FOLLOW: 'FOLLOW',
          }).map(([name, equals]) => [name, { column: 'event_type', equals }]),
        ),
      },
    ],
    tasks: ['like = LIKE once', 'bookmark = BOOKMARK once', 'any = LIKE or BOOKMARK or COMMENT or FOLLOW once'],
  }),
  /** A request is a user at one timestamp. */
  'ranking/ml-100k': folder => ({
    name: 'ml-100k',
    sources: [
      {
        path: join(folder, 'ml-100k.inter'),
        ...{ user: 'user_id', item: 'item_id', time: 'timestamp' },
        actions: Object.fromEntries(
          [1, 2, 3, 4, 5].map(n => [`RATED ${n}`, { column: 'rating', atLeast: n, atMost: n }]),
        ),
        values: { rating: 'rating' },
      },
    ],
    tasks: ['good = rating >= 4'],
  }),
}

/** Names of {@link rankingPreset}. */
export const rankingPresetNames: readonly string[] = Object.keys(presets)

/**
 * The mapping of a public data set whose files lie in `folder`.
 * @throws HstuError ERR_HSTU_INVALID_ARGUMENT that lists the names.
 */
export function rankingPreset(name: string, folder: string): RequestMapping {
  if (!Object.hasOwn(presets, name))
    throw new HstuError(
      'ERR_HSTU_INVALID_ARGUMENT',
      `unknown preset '${name}'. Presets: ${rankingPresetNames.join(', ')}`,
    )
  return presets[name]!(folder)
}
