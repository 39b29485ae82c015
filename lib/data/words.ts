/** 64-bit integers as low word, high word: loops over them make no bigint an entry. */
export function wordsOf(array: BigInt64Array): Int32Array {
  return new Int32Array(array.buffer, array.byteOffset, 2 * array.length)
}
