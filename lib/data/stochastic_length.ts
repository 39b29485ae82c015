import { check } from '../errors.js'
import type { Random } from '../random.js'
import { wordsOf } from './words.js'

/** Values of {@link LengthSelection}. */
export const lengthSelections = ['weighted', 'recent', 'random'] as const
/** Which rows of a sequence that is too long stay: by weight 1 - age / (sum of ages), without replacement; the latest; any, alike. */
export type LengthSelection = (typeof lengthSelections)[number]

/** Rows of one sequence, L of them, in order of time. */
export interface SequenceRows {
  /** [L] seconds */
  times: BigInt64Array
  /** [L] tokens of each row, which stay or go together; default one each. */
  tokens?: Uint8Array
  /** [L] not 0: rows that go last. */
  wanted?: Uint8Array
}

/**
 * Stochastic Length (Zhai et al. 2024, section 2.3 and appendix F.1): in training a sequence of n tokens, n above tau = floor(N^(alpha / 2)),
 * is used whole with probability N^alpha / n^2, otherwise as a subsequence of tau tokens. Attention then costs O(N^alpha) a sequence.
 */
export class StochasticLength {
  /** tau: sequences of so many tokens are always whole. */
  readonly bound: number

  /**
   * @param alpha above 1, at most 2, which leaves all as it is
   * @param maxTokens N, of the longest sequence
   * @throws HstuError ERR_HSTU_INVALID_ARGUMENT
   */
  constructor(
    readonly alpha: number,
    readonly maxTokens: number,
    readonly selection: LengthSelection = 'weighted',
  ) {
    check(alpha > 1 && alpha <= 2, 'ERR_HSTU_INVALID_ARGUMENT', () => `alpha must be in (1, 2], got ${alpha}`)
    const whole = Number.isInteger(maxTokens) && maxTokens > 0
    check(whole, 'ERR_HSTU_INVALID_ARGUMENT', () => `maxTokens must be a positive integer, got ${maxTokens}`)
    this.bound = Math.floor(maxTokens ** (alpha / 2) * (1 + 1e-12)) // 1024^.9 is 512
  }

  /** Chance that a sequence of n tokens is used whole. */
  wholeProbability(n: number): number {
    return n <= this.bound ? 1 : this.maxTokens ** this.alpha / n ** 2
  }

  /** Mean of the tokens that are used of n, and of their square. */
  expected(n: number): { length: number; square: number } {
    const [p, cut] = [this.wholeProbability(n), Math.min(n, this.bound)]
    return { length: p * n + (1 - p) * cut, square: p * n ** 2 + (1 - p) * cut ** 2 }
  }

  /**
   * Draws what of a sequence is used.
   * @returns [L] 1 for the rows that stay; null for all of them
   */
  choose({ times, tokens, wanted }: SequenceRows, random: Random): Uint8Array | null {
    const L = times.length
    let n = tokens ? 0 : L
    if (tokens) for (let i = 0; i < L; i++) n += tokens[i]!
    if (n <= this.bound || random.float() < this.wholeProbability(n)) return null
    const keys = this.#keys(times, random)
    if (wanted) for (let i = 0; i < L; i++) if (wanted[i]) keys[i] = -1 / (1 + keys[i]!)
    const limit = largestWithin(this.bound, keys, tokens ?? new Uint8Array(L).fill(1), n)
    const stays = new Uint8Array(L)
    for (let i = 0; i < L; i++) stays[i] = Number(keys[i]! <= limit)
    return stays
  }

  /** [L] rows stay by ascending key, 0 or more. */
  #keys(times: BigInt64Array, random: Random): Float64Array {
    const L = times.length
    const keys = new Float64Array(L)
    if (this.selection === 'recent') for (let i = 0; i < L; i++) keys[i] = L - 1 - i
    if (this.selection === 'random') for (let i = 0; i < L; i++) keys[i] = random.float()
    if (this.selection !== 'weighted') return keys
    const words = wordsOf(times)
    const now = Number(times[L - 1]!)
    let total = 0
    for (let i = 0; i < L; i++) total += keys[i] = now - (words[2 * i + 1]! * 2 ** 32 + (words[2 * i]! >>> 0))
    // The smallest of exponential variables of rates w are a sample without replacement by weights w (Efraimidis and Spirakis, 2006).
    for (let i = 0; i < L; i++) {
      const weight = total > 0 ? 1 - keys[i]! / total : 1
      keys[i] = -Math.log(1 - random.float()) / weight
    }
    return keys
  }
}

/** The largest key up to which rows have `bound` tokens at most, of `all`; -Infinity for none. Quickselect, by tokens. */
function largestWithin(bound: number, keys: Float64Array, tokens: Uint8Array, all: number): number {
  const [left, weights] = [keys.slice(), tokens.slice()]
  const sample = new Float64Array(32)
  let [count, total, room, limit] = [left.length, all, bound, -Infinity]
  while (count > 0) {
    let pivot = left[count >> 1]!
    if (count > 8 * sample.length) {
      const stride = Math.floor(count / sample.length)
      for (let i = 0; i < sample.length; i++) sample[i] = left[i * stride]!
      pivot = sample.sort()[Math.min(sample.length - 1, Math.floor((room / total) * sample.length))]!
    }
    let sum = 0
    for (let i = 0; i < count; i++) sum += left[i]! <= pivot ? weights[i]! : 0
    const fits = sum <= room
    if (fits) {
      limit = pivot
      room -= sum
    }
    total = fits ? total - sum : sum
    let rest = 0
    for (let i = 0; i < count; i++) {
      const key = left[i]!
      left[rest] = key
      weights[rest] = weights[i]!
      rest += Number(fits ? key > pivot : key < pivot)
    }
    count = rest
  }
  return limit
}

/** Sums over the sequences of a run; plain JSON. */
export interface LengthCounts {
  sequences: number
  /** Of them, those that were cut. */
  cut: number
  /** Tokens before and after, and the sums of their squares. */
  tokens: number
  kept: number
  squares: number
  keptSquares: number
  /** Rows with a loss that were cut away. */
  labels: number
}

/** Of no sequences. */
export function newLengthCounts(): LengthCounts {
  return { sequences: 0, cut: 0, tokens: 0, kept: 0, squares: 0, keptSquares: 0, labels: 0 }
}

/** How much shorter sequences became. NaN where there were none. */
export interface SparsityReport {
  alpha: number
  selection: LengthSelection
  /** N, tau. */
  maxTokens: number
  bound: number
  sequences: number
  cut: number
  labels: number
  /** Tokens of a sequence before and after. */
  meanLength: number
  meanKept: number
  /** 1 - mean(n') / N, 1 - mean(n'^2) / N^2; and the same of the sequences as they were: padding. */
  sparsity: number
  squareSparsity: number
  padding: number
  squarePadding: number
}

/** What the sums of a run come to. */
export function sparsityReport(counts: LengthCounts, lengths: StochasticLength): SparsityReport {
  const { alpha, selection, maxTokens, bound } = lengths
  const { sequences, cut, labels } = counts
  const mean = (sum: number) => sum / sequences
  return {
    ...{ alpha, selection, maxTokens, bound, sequences, cut, labels },
    ...{ meanLength: mean(counts.tokens), meanKept: mean(counts.kept) },
    sparsity: 1 - mean(counts.kept) / maxTokens,
    squareSparsity: 1 - mean(counts.keptSquares) / maxTokens ** 2,
    padding: 1 - mean(counts.tokens) / maxTokens,
    squarePadding: 1 - mean(counts.squares) / maxTokens ** 2,
  }
}
