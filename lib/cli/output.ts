/** A result on stdout. */
export function print(text = ''): void {
  process.stdout.write(`${text}\n`)
}

export function printJson(value: unknown): void {
  print(JSON.stringify(value, null, 2))
}

/** Terminal columns that a string takes: wide characters count two, combining ones none. */
function width(text: string): number {
  let sum = 0
  for (const character of text) {
    const code = character.codePointAt(0)!
    if (/\p{M}|\u200b|\u200d/u.test(character)) continue
    const wide =
      code >= 0x1100 &&
      /[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60]/.test(character)
    sum += wide || code >= 0x1f300 ? 2 : 1
  }
  return sum
}

/** Columns aligned; `left` names those that are text, the others stand to the right. */
export function table(
  header: readonly string[],
  rows: readonly (readonly string[])[],
  left: readonly number[] = [0],
): string {
  const all = [header, ...rows]
  const widths = header.map((_, c) => Math.max(...all.map(row => width(row[c] ?? ''))))
  const line = (row: readonly string[]) =>
    row
      .map((cell, c) => {
        const space = ' '.repeat(widths[c]! - width(cell))
        return left.includes(c) ? cell + space : space + cell
      })
      .join('  ')
      .trimEnd()
  return [line(header), widths.map(w => '-'.repeat(w)).join('  '), ...rows.map(line)].join('\n')
}

/** 1234567 as 1,234,567. */
export function count(value: number): string {
  return Math.round(value).toLocaleString('en-US')
}

/** A number and what it counts. */
export function counted(value: number, one: string, many = `${one}s`): string {
  return `${count(value)} ${value === 1 ? one : many}`
}

/** A metric, which is between 0 and 1. */
export function metric(value: number): string {
  return value.toFixed(4)
}

export function percent(value: number): string {
  return `${(100 * value).toFixed(1)} %`
}

/** 12345 as 12.3k. */
export function compact(value: number): string {
  if (!(value >= 1000)) return value.toFixed(0)
  return value < 1e6 ? `${(value / 1e3).toFixed(value < 1e4 ? 1 : 0)}k` : `${(value / 1e6).toFixed(1)}M`
}

/** 75 as 1:15. */
export function clock(seconds: number): string {
  if (!Number.isFinite(seconds)) return '-'
  const whole = Math.max(0, Math.round(seconds))
  const [h, m, s] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, String(whole % 60).padStart(2, '0')]
  return h > 0 ? `${h}:${String(m).padStart(2, '0')}:${s}` : `${m}:${s}`
}

/** Seconds since 1970 as a day, or as they are where they are no such thing. */
export function day(seconds: number): string {
  const date = new Date(seconds * 1000)
  return Number.isNaN(date.getTime()) ? String(seconds) : date.toISOString().slice(0, 10)
}
