const REDRAW_MS = 100
const LINE_MS = 5000

/**
 * How far something has come, on stderr: on a terminal a bar that is redrawn in place, otherwise a plain line every few seconds.
 * Lines that are to stay go through `log`.
 */
export class Progress {
  readonly #terminal = process.stderr.isTTY === true && process.env.TERM !== 'dumb'
  #last = performance.now() - (process.stderr.isTTY ? REDRAW_MS : 0)
  #drawn = false
  /** The widest text so far, so that the bar keeps its size. */
  #width = 0

  constructor(private label: string) {}

  /** From here on it is about something else. */
  start(label: string): void {
    this.label = label
  }

  /** @param total null while that is not known */
  update(done: number, total: number | null, details = ''): void {
    const now = performance.now()
    if (now - this.#last < (this.#terminal ? REDRAW_MS : LINE_MS)) return
    this.#last = now
    const share = total ? Math.min(1, done / total) : null
    const parts = share === null ? '' : `${String(Math.floor(100 * share)).padStart(3)} %`
    if (!this.#terminal) {
      const of = total ? `${done}/${total}` : `${done}`
      process.stderr.write(`${[this.label, parts, of, details].filter(Boolean).join('  ')}\n`)
      return
    }
    const room = (process.stderr.columns ?? 80) - 1
    const text = [parts, details].filter(Boolean).join('  ')
    this.#width = Math.max(this.#width, this.label.length + text.length)
    const size = Math.min(40, room - this.#width - 4)
    const line = `${this.label} ${share === null || size < 8 ? '' : bar(share, size)} ${text}`
    process.stderr.write(`\r\u001b[2K${line.slice(0, room)}`)
    this.#drawn = true
  }

  /** A line that stays. */
  log(line: string): void {
    this.clear()
    process.stderr.write(`${line}\n`)
  }

  /** Removes the bar. */
  clear(): void {
    if (this.#drawn) process.stderr.write('\r\u001b[2K')
    this.#drawn = false
  }
}

const EIGHTHS = [' ', '▏', '▎', '▍', '▌', '▋', '▊', '▉']

function bar(share: number, size: number): string {
  const eighths = Math.round(share * size * 8)
  const full = Math.floor(eighths / 8)
  const part = full < size ? EIGHTHS[eighths % 8]! : ''
  return `│${('█'.repeat(full) + part).padEnd(size)}│`
}
