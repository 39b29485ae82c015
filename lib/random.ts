/** State of a {@link Random} as plain JSON. */
export interface RandomState {
  algorithm: 'xoshiro128**'
  /** Hash of the seed and of the labels forked by: what `fork` derives from. */
  key: number
  /** Four unsigned 32-bit words. */
  words: [number, number, number, number]
}

/**
 * Seeded random numbers for everything on the host that must repeat exactly: shuffles, synthetic data, Stochastic
 * Length. The stream is the same on every platform and Node version. Not for secrets.
 *
 * xoshiro128** 1.1 (Blackman and Vigna, "Scrambled Linear Pseudorandom Number Generators", 2021), its state filled by
 * the splitmix32 sequence of the seed's hash.
 */
export class Random {
  #key: number
  #a = 0
  #b = 0
  #c = 0
  #d = 0

  /** @param seed any number or string; hashed to 32 bits, so that near seeds give unrelated streams. */
  constructor(seed: number | string) {
    this.#key = hash(`${typeof seed}:${seed}`, 0x811c9dc5)
    this.#fill()
  }

  #fill(): void {
    let x = this.#key
    const next = () => {
      x = (x + 0x9e3779b9) | 0
      return mix(x)
    }
    this.#a = next()
    this.#b = next()
    this.#c = next()
    // An all-zero state would stay zero for ever.
    this.#d = next() | 1
  }

  /** Uniform unsigned 32-bit integer. */
  uint32(): number {
    const scaled = Math.imul(this.#b, 5)
    const result = Math.imul((scaled << 7) | (scaled >>> 25), 9)
    const t = this.#b << 9
    this.#c ^= this.#a
    this.#d ^= this.#b
    this.#b ^= this.#c
    this.#a ^= this.#d
    this.#c ^= t
    this.#d = (this.#d << 11) | (this.#d >>> 21)
    return result >>> 0
  }

  /** Uniform in [0, 1) with 53 random bits; takes two draws of `uint32`. */
  float(): number {
    const high = this.uint32() >>> 5
    return (high * 0x4000000 + (this.uint32() >>> 6)) / 0x20000000000000
  }

  /** Standard normal (Box-Muller; the second value of the pair is not kept, so that the state is four words alone). */
  normal(): number {
    return Math.sqrt(-2 * Math.log(1 - this.float())) * Math.cos(2 * Math.PI * this.float())
  }

  /** Uniform integer in `0 .. n-1`, without modulo bias; `1 <= n <= 2^32`. */
  int(n: number): number {
    if (!(Number.isInteger(n) && n >= 1 && n <= 0x100000000))
      throw new RangeError(`int(n): n is ${n}, not in 1 .. 2^32`)
    const limit = 0x100000000 - (0x100000000 % n)
    let x = this.uint32()
    while (x >= limit) x = this.uint32()
    return x % n
  }

  /** Fisher-Yates in place; returns its argument. */
  shuffle<A extends { length: number; [index: number]: unknown }>(array: A): A {
    for (let i = array.length - 1; i > 0; i--) {
      const j = this.int(i + 1)
      const swap = array[i]
      array[i] = array[j]
      array[j] = swap
    }
    return array
  }

  /**
   * An independent generator named by `label`. It depends on this one's seed and on the label, not on how many numbers
   * were drawn: what one part of a program draws does not move another part.
   */
  fork(label: number | string): Random {
    const child = new Random(0)
    child.#key = hash(`/${typeof label}:${label}`, this.#key)
    child.#fill()
    return child
  }

  /** Everything needed to go on exactly from here, as plain JSON. */
  state(): RandomState {
    return {
      algorithm: 'xoshiro128**',
      key: this.#key >>> 0,
      words: [this.#a >>> 0, this.#b >>> 0, this.#c >>> 0, this.#d >>> 0],
    }
  }

  /** Goes on from a state taken earlier. @throws RangeError if it is not one. */
  setState(state: RandomState): void {
    const words = state?.words
    const valid = Array.isArray(words) && words.length === 4 && [state.key, ...words].every(w => w >>> 0 === w)
    if (state?.algorithm !== 'xoshiro128**' || !valid || words.every(w => w === 0)) {
      throw new RangeError('not the state of a xoshiro128** generator')
    }
    this.#key = state.key | 0
    this.#a = words[0] | 0
    this.#b = words[1] | 0
    this.#c = words[2] | 0
    this.#d = words[3] | 0
  }
}

/** The finaliser of MurmurHash3. */
function mix(value: number): number {
  let x = value
  x = Math.imul(x ^ (x >>> 16), 0x85ebca6b)
  x = Math.imul(x ^ (x >>> 13), 0xc2b2ae35)
  return x ^ (x >>> 16)
}

/** FNV-1a over UTF-16 units, finalised. */
function hash(text: string, start: number): number {
  let x = start | 0
  for (let i = 0; i < text.length; i++) x = Math.imul(x ^ text.charCodeAt(i), 0x01000193)
  return mix(x)
}
