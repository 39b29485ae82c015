import { HstuError } from '../errors.js'
import { rowwiseAdagrad } from '../ops/rowwise_adagrad.js'
import { Tensor, unscoped } from '../tensor.js'

export interface RowwiseAdagradOptimizerOptions {
  /** Learning rate where `step` is given none. Default 1e-3. */
  lr?: number
  /** Default 1e-8. */
  eps?: number
}

/** The gradient of rows as they were looked up: rows[t] is that of row ids[t]. */
export interface RowGradient {
  /** int64 [T]; ids may repeat. */
  ids: Tensor
  /** [T, d] */
  rows: Tensor
}

/**
 * Row-wise Adagrad over named tables of fixed size: a step costs what it touches, not what the tables hold. The gradient of looked-up rows
 * comes from a lookup outside the tape: `x = embedding(table, ids)` is then a parameter of `valueAndGrad`. (A table that grows is an
 * {@link EmbeddingTable}, which steps by itself.)
 */
export class RowwiseAdagrad {
  /** Sum of the rows' mean squared gradients, [I], named like the tables. */
  readonly accumulators: Record<string, Tensor>

  constructor(
    readonly tables: Record<string, Tensor>,
    readonly options: RowwiseAdagradOptimizerOptions = {},
  ) {
    this.accumulators = unscoped(() => {
      const zeros = ({ shape, dtype, device }: Tensor) =>
        Tensor.zeros([shape[0]!], { dtype: dtype === 'float64' ? dtype : 'float32', device })
      return Object.fromEntries(Object.entries(tables).map(([name, table]) => [name, zeros(table)]))
    })
  }

  /**
   * One update in place of the rows that the gradients name; a table without a gradient keeps its bits.
   * @throws HstuError ERR_HSTU_INVALID_ARGUMENT for a gradient of no table.
   */
  step(gradients: Record<string, RowGradient>, lr = this.options.lr ?? 1e-3): void {
    for (const name of Object.keys(gradients))
      if (!this.tables[name])
        throw new HstuError('ERR_HSTU_INVALID_ARGUMENT', `RowwiseAdagrad: no table is named ${name}`)
    for (const [name, { ids, rows }] of Object.entries(gradients))
      rowwiseAdagrad(this.tables[name]!, this.accumulators[name]!, rows, ids, { lr, eps: this.options.eps ?? 1e-8 })
  }

  /** Frees the accumulators. */
  dispose(): void {
    for (const tensor of Object.values(this.accumulators)) tensor.dispose()
  }
}
