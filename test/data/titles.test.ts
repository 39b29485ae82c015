import { describe, expect, it } from 'vitest'
import { loadItemTitles } from '#lib/data/load.js'
import { expectError, temporaryFiles } from './files.js'

const write = temporaryFiles()

describe('loadItemTitles', () => {
  it('reads .item, movies.dat in Latin-1 and movies.csv', async () => {
    const item = write('x.item', 'item_id:token\tmovie_title:token_seq\tyear:token\n12\tToy "Story\t1995\n')
    expect([...(await loadItemTitles(item))]).toEqual([['12', 'Toy "Story']])
    const dat = write('movies.dat', Buffer.from('1::Am\xe9lie (2001)::Comedy\n2::A::B::Drama\n', 'latin1'))
    expect([...(await loadItemTitles(dat))]).toEqual([
      ['1', 'Amélie (2001)'],
      ['2', 'A::B'],
    ])
    const csv = write('movies.csv', 'movieId,title,genres\n1,"Am""élie, the",Comedy\n')
    expect([...(await loadItemTitles(csv))]).toEqual([['1', 'Am"élie, the']])
  })

  it('names file and line of what is wrong', async () => {
    await expectError(loadItemTitles(write('y.item', 'item_id:token\ta:float\n')), [':1: ', '"item_id", "a"'])
    await expectError(loadItemTitles(write('z.item', 'item_id:token\tname:token_seq\n1\n')), [':2: ', '2 columns'])
    await expectError(loadItemTitles(write('y.dat', 'x\n')), [':1: ', 'id::title::genres'])
    await expectError(loadItemTitles(write('y.txt', 'x\n')), ['movies.csv'])
  })
})
