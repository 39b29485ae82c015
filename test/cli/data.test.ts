import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { buildIfMissing, cli, hstu, temporaryFolder } from './process.js'

beforeAll(buildIfMissing)
const folder = temporaryFolder()
const at = (name: string) => join(folder, name)
const rows = ['r1,u,A,100,1', 'r1,u,B,100,0', 'r2,u,A,200,0', 'r3,v,C,300,1', 'r4,v,A,400,1']
writeFileSync(at('log.csv'), `req,user,item,time,like\n${rows.join('\n')}\n`)
const mapping = {
  name: 'tiny',
  sources: [
    {
      ...{ path: 'log.csv', user: 'user', item: 'item', time: 'time', request: 'req' },
      actions: { VIEW: true, LIKE: { column: 'like', equals: '1' } },
    },
  ],
  tasks: ['like = LIKE once'],
}
writeFileSync(at('mapping.json'), JSON.stringify(mapping))
writeFileSync(at('wrong.json'), JSON.stringify({ ...mapping, sources: [{ ...mapping.sources[0], item: 'article' }] }))

describe('data prepare and data inspect', () => {
  it('prepare and describe request records', async () => {
    const made = await hstu(['data', 'prepare', '--mapping', at('mapping.json'), '--out', at('out')])
    expect(made).toMatchObject({ code: 0, stderr: '' })
    expect(made.stdout).toMatch(/tiny: 4 requests, 5 candidates in 1 shard/)
    const seen = await hstu(['data', 'inspect', at('out')])
    expect(seen.code).toBe(0)
    expect(seen.stdout).toMatch(/candidates a request: 1 to 2, mean 1\.25 \(the dedup factor\)/)
    expect(seen.stdout).toMatch(/^LIKE +60\.0 % +66\.7 %$/m)
    expect(seen.stdout).toMatch(/^like +binary +4 +0\.7500/m) // A was liked before r2
    const report = JSON.parse((await hstu(['data', 'inspect', at('out'), '--json'])).stdout)
    expect(report).toMatchObject({
      ...{ requests: 4, candidates: 5, users: 2, items: 3, historyEntries: 3, pending: 0, dedupFactor: 1.25 },
      historyHistogram: [
        { from: 0, to: 0, requests: 2 },
        { from: 1, to: 1, requests: 1 },
        { from: 2, to: 3, requests: 1 },
      ],
      actions: [
        { name: 'VIEW', candidates: 1, history: 1 },
        { name: 'LIKE', candidates: 0.6, history: 2 / 3 },
      ],
    })
    expect(report.bytes.impressionRows).toBeGreaterThan(report.bytes.records)
  })

  it('make the synthetic stream', async () => {
    const sizes = ['users=30', 'items=60', 'categories=10', 'days=6'].flatMap(pair => ['--set', pair])
    const args = ['data', 'prepare', '--preset', 'ranking/synthetic', ...sizes, '--out', at('syn'), '--json']
    const { code, stdout } = await hstu(args)
    expect(code).toBe(0)
    const manifest = JSON.parse(stdout)
    expect(manifest).toMatchObject({ name: 'synthetic', schema: { series: ['language'], values: ['watch'] } })
    expect(manifest.oracleNe).toBeLessThan(1)
  })

  it('say what is wrong, and leave nothing behind', async () => {
    const prepare = (...args: string[]) => hstu(['data', 'prepare', '--out', at('bad'), ...args])
    const error = async (args: string[], code: number, message: RegExp) => {
      const result = await prepare(...args)
      expect(result).toMatchObject({ code, stdout: '' })
      expect(result.stderr).toMatch(message)
      expect(result.stderr).not.toMatch(/^ {4}at /m)
    }
    await error([], 2, /either --mapping or --preset/)
    await error(['--preset', 'ranking/ml-100k'], 2, /--data names the folder/)
    await error(['--preset', 'ranking/ml', '--data', folder], 1, /unknown preset 'ranking\/ml'/)
    await error(['--preset', 'ranking/ml-100k', '--data', folder], 1, /ml-100k\.inter: no such file.*ERR_HSTU_DATA/)
    await error(['--preset', 'ranking/synthetic', '--set', 'people=3'], 2, /--set knows users/)
    await error(['--mapping', at('absent.json')], 1, /absent\.json: no such file/)
    await error(['--mapping', at('wrong.json')], 1, /log\.csv:1: no column "article" for the item: it has "req"/)
    const again = await hstu(['data', 'prepare', '--mapping', at('mapping.json'), '--out', at('out')])
    expect(again.stderr).toMatch(/out: exists/)
    expect(existsSync(at('bad'))).toBe(false)
    expect(readdirSync(folder).filter(name => /tmp/.test(name))).toEqual([])
    expect((await hstu(['data', 'inspect', folder])).stderr).toMatch(/expected a folder of request records/)
    expect((await hstu(['data', 'inspect', at('nothing')])).stderr).toMatch(/no such file/)
  })

  it('leave nothing that reads as a whole when killed while shards are written', async () => {
    mkdirSync(at('kill'))
    mkdirSync(at('scratch'))
    const old = at('kill/out')
    const prepare = (users: number) => {
      const sizes = [`users=${users}`, 'items=900', 'days=60'].flatMap(pair => ['--set', pair])
      return ['data', 'prepare', '--preset', 'ranking/synthetic', ...sizes, '--out', old, '--replace']
    }
    for (const before of [null, 'the first one']) {
      const env = { ...process.env, TMPDIR: at('scratch') } // where the generated log is left
      const child = spawn(process.execPath, [cli, ...prepare(400)], { stdio: 'ignore', env })
      const exit = once(child, 'exit')
      const partial = () =>
        readdirSync(at('kill')).find(
          name => /\.tmp$/.test(name) && readdirSync(at(`kill/${name}`)).includes('requests-00000.parquet'),
        )
      while (!partial() && child.exitCode === null) await new Promise(resolve => setTimeout(resolve, 1))
      child.kill('SIGKILL')
      expect((await exit)[1]).toBe('SIGKILL')
      const left = readdirSync(at('kill')).find(name => /\.tmp$/.test(name))!
      expect(readdirSync(at(`kill/${left}`))).not.toContain('manifest.json')
      expect((await hstu(['data', 'inspect', at(`kill/${left}`)])).stderr).toMatch(
        /expected a folder of request records/,
      )
      if (before === null) expect(existsSync(old)).toBe(false)
      else expect(JSON.parse(readFileSync(join(old, 'manifest.json'), 'utf8')).sizes.users).toBe(30)
      expect((await hstu(prepare(30))).code).toBe(0)
      expect((await hstu(['data', 'inspect', old])).stdout).toMatch(/30 users/)
      expect(readdirSync(at('kill'))).toEqual(['out'])
    }
  })

  it('are found by their group', async () => {
    expect((await hstu(['data', '--help'])).stdout).toMatch(/data prepare/)
    expect((await hstu(['data', 'prepar'])).stderr).toMatch(/Did you mean data prepare\?/)
    expect((await hstu(['data', 'prepare', '--help'])).stdout).toMatch(/^Usage: hstu data prepare --out FOLDER/)
  })
})
