import { MessageChannel, type MessagePort, receiveMessageOnPort, Worker } from 'node:worker_threads'
import { HstuError } from '../errors.js'
import { AWAKE_MS, Awake } from './awake.js'
import { clock, type EngineJob, type FromWorker, type ToWorker } from './messages.js'

/** The same path from the sources and from what is built of them: a thread runs what is built. */
const WORKER = new URL('../../dist/serve/worker.js', import.meta.url)
/** How long a pass that is under way has to end. */
const END_MS = 10_000

/** The thread of an engine, as the caller's thread speaks to it. */
export class EngineThread {
  /** What comes from it. */
  receive: (message: FromWorker) => void = () => {}
  /** It ended: told once or twice. */
  ended: (error: HstuError) => void = () => {}
  /** Whether both threads wait for each other awake: where the device computes they have time to. */
  awake = false
  readonly #worker: Worker
  readonly #port: MessagePort
  readonly #turns = new Awake(() => {
    this.#drain()
    return this.#open
  })
  #open = true
  #closing = false
  #idleSince = 0

  constructor(job: Omit<EngineJob, 'port'>) {
    const { port1, port2 } = new MessageChannel()
    this.#port = port1
    // Flags such as --input-type are for the program's own file.
    this.#worker = new Worker(WORKER, { workerData: { ...job, port: port2 }, transferList: [port2], execArgv: [] })
    port1.on('message', (message: FromWorker) => this.receive(message))
    this.#worker.on('error', error => this.#end(`: ${error}`, error))
    this.#worker.on('exit', () => this.#end(''))
  }

  post(message: ToWorker, transfer: ArrayBuffer[] = []): void {
    this.#port.postMessage(message, transfer)
  }

  /** Whether something is awaited from it: the process stays alive for that, and no longer. */
  hold(open: boolean): void {
    if (open === this.#open) return
    this.#open = open
    // Of both: where the thread dies its port goes first, and the process would end before it is told.
    if (open) {
      this.#worker.ref()
      this.#port.ref()
      return
    }
    if (!this.#closing) this.#worker.unref()
    this.#port.unref()
    this.#idleSince = clock()
  }

  /** A request is about to come: where the thread sleeps, it wakes while the request is looked at. */
  wake(): void {
    if (this.awake && AWAKE_MS > 0 && !this.#open && clock() - this.#idleSince > AWAKE_MS) this.post({ type: 'wake' })
  }

  /** What was sent is likely to be answered soon. */
  stayAwake(): void {
    if (this.awake && AWAKE_MS > 0) this.#turns.stay()
  }

  /** Lets it end when it has come to the end of what it does. */
  async close(): Promise<void> {
    const exited = new Promise(resolve => this.#worker.once('exit', resolve))
    this.#closing = true
    this.#worker.ref()
    this.post({ type: 'close' })
    const timer = setTimeout(() => void this.#worker.terminate(), END_MS)
    if (this.#worker.threadId !== -1) await exited
    clearTimeout(timer)
  }

  async terminate(): Promise<void> {
    await this.#worker.terminate()
  }

  /** What came and was not told of yet. */
  #drain(): void {
    for (let next = receiveMessageOnPort(this.#port); next; next = receiveMessageOnPort(this.#port))
      this.receive(next.message)
  }

  #end(why: string, cause?: unknown): void {
    this.#drain()
    this.ended(new HstuError('ERR_HSTU_DEVICE_LOST', `the engine's thread ended${why}`, cause ? { cause } : {}))
  }
}
