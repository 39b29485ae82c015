export { reshape, valueAndGrad } from './autograd.js'
export type { Batch, EvalBatch, FilterSeen, RetrievalBatch } from './data/batch.js'
export { evalBatch, requestBatch, trainBatch } from './data/batch.js'
export { itemCounts, type SequenceDataset } from './data/dataset.js'
export { toInputs, toTargets } from './data/inputs.js'
export { inspectDataset } from './data/inspect.js'
export { type ColumnMapping, type LoadOptions, loadDataset, loadItemTitles } from './data/load.js'
export { concatBatches, expandBatch, selectHistory, sliceBatch, truncateHistory } from './data/ranking/batches.js'
export { inspectRequests } from './data/ranking/inspect.js'
export type { RequestManifest } from './data/ranking/manifest.js'
export { type LogSource, type RequestMapping, readMapping } from './data/ranking/mapping.js'
export { type PrepareOptions, prepareRequests } from './data/ranking/prepare.js'
export { rankingPreset, rankingPresetNames } from './data/ranking/presets.js'
export { type RankerBatch, rankerBatch } from './data/ranking/ranker_inputs.js'
export { type ReadRequestsOptions, RequestReader } from './data/ranking/reader.js'
export type {
  CandidateRows,
  HistoryRows,
  RankingEvent,
  RequestBatch,
  RequestSchema,
  TaskTargets,
} from './data/ranking/schema.js'
export { type ActionFusion, type TokenLayout, tokenLayout } from './data/ranking/sequence.js'
export { shortenHistories } from './data/ranking/shorten.js'
export { syntheticMapping, writeSyntheticLog } from './data/ranking/synthetic.js'
export { parseTasks, type RankingTask, type Supervision, taskTargets } from './data/ranking/tasks.js'
export { epochBatches, evaluableUsers, type SplitProtocol, type TrainPart, trainableUsers } from './data/split.js'
export {
  type LengthSelection,
  type SparsityReport,
  StochasticLength,
  sparsityReport,
} from './data/stochastic_length.js'
export { syntheticStream } from './data/synthetic.js'
export { HstuError, type HstuErrorCode } from './errors.js'
export { type FeatureGroup, type Impression, recency, runningMeans, similarHistory } from './eval/baseline_features.js'
export { CountedMetrics } from './eval/counted_metrics.js'
export { type EvaluateOptions, evaluate } from './eval/evaluate.js'
export { type LogisticOptions, logisticRegression } from './eval/logistic_baseline.js'
export { METRIC_KS, type Metrics, rankingMetrics } from './eval/metrics.js'
export {
  type BaselineReport,
  evaluateBaselines,
  type OnlineBaseline,
  onlineBaselines,
} from './eval/ranking_baselines.js'
export { type BinaryMetrics, binaryMetrics, StreamingMetrics } from './eval/ranking_metrics.js'
export { type Recommendation, recommend } from './eval/recommend.js'
export { type CaptureOptions, captureGraph, type Graph, type Graphed, type GraphOptions, graphed } from './graph.js'
export { MultiHeadAttention } from './layers/attention.js'
export {
  EmbeddingTable,
  type EmbeddingTableConfig,
  type EmbeddingTableState,
  type EvictionReport,
  type TableRows,
} from './layers/embedding_table.js'
export { FeedForward } from './layers/feed_forward.js'
export { HstuLayer, type HstuLayerConfig } from './layers/hstu_layer.js'
export type { Noise, SequenceInputs, TokenInputs } from './layers/inputs.js'
export type { Precision } from './layers/precision.js'
export { SwishMlp, type SwishMlpConfig } from './layers/swish_mlp.js'
export {
  type CandidatePairs,
  candidatePairs,
  TargetAttention,
  type TargetAttentionConfig,
} from './layers/target_attention.js'
export { type NextItemLossOptions, nextItemLoss } from './losses/next_item.js'
export { type AnySequenceModel, createModel, type ModelSpec } from './models/create.js'
export { Din, type DinConfig, type DinInputs } from './models/din.js'
export {
  GenerativeRanker,
  type GenerativeRankerConfig,
  type RankerInputs,
  type RankerLoss,
  type RankerTask,
} from './models/generative_ranker.js'
export { HSTU, type HstuConfig } from './models/hstu.js'
export { SASRec, type SASRecConfig } from './models/sasrec.js'
export { type ModelOptions, SequenceModel, type SequenceModelConfig } from './models/sequence_model.js'
export { Transformer, type TransformerConfig } from './models/transformer.js'
export { adamw } from './ops/adamw.js'
export { add } from './ops/add.js'
export { type BceWithLogitsLossOptions, bceWithLogitsLoss } from './ops/bce_with_logits_loss.js'
export { cast } from './ops/cast.js'
export { concat } from './ops/concat.js'
export { cumsum } from './ops/cumsum.js'
export { deinterleave } from './ops/deinterleave.js'
export { denseToJagged } from './ops/dense_to_jagged.js'
export { dropout } from './ops/dropout.js'
export { embedding } from './ops/embedding.js'
export { expand, segmentSum } from './ops/expand.js'
export { globalNormClip } from './ops/global_norm_clip.js'
export { emptyHashIndex, type HashIndex, type HashLookupOptions, hashLookup } from './ops/hash_lookup.js'
export { type HstuAttentionOptions, hstuAttention } from './ops/hstu_attention.js'
export { interleave } from './ops/interleave.js'
export { jaggedToDense } from './ops/jagged_to_dense.js'
export { type KvAppendOptions, kvAppend } from './ops/kv_append.js'
export { type KvGatherOptions, kvGather } from './ops/kv_gather.js'
export { l2Normalize } from './ops/l2_normalize.js'
export { layerNorm } from './ops/layer_norm.js'
export { type LinearOptions, linear } from './ops/linear.js'
export { type MseLossOptions, mseLoss } from './ops/mse_loss.js'
export { mul } from './ops/mul.js'
export { type MultiHotEmbeddingOptions, multiHotEmbedding } from './ops/multi_hot_embedding.js'
export { type NormGateLinearOptions, normGateLinear } from './ops/norm_gate_linear.js'
export { type NormLinearSiluOptions, normLinearSilu } from './ops/norm_linear_silu.js'
export { positionEmbedding } from './ops/position_embedding.js'
export { randomIds } from './ops/random_ids.js'
export { type RandomUniformOptions, randomUniform } from './ops/random_uniform.js'
export { type RowwiseAdagradOptions, rowwiseAdagrad } from './ops/rowwise_adagrad.js'
export { sampledSoftmaxLoss } from './ops/sampled_softmax_loss.js'
export { softmaxLoss } from './ops/softmax_loss.js'
export { split } from './ops/split.js'
export { swishLayerNorm } from './ops/swish_layer_norm.js'
export { targetRank } from './ops/target_rank.js'
export { topK } from './ops/top_k.js'
export { AdamW, type AdamWOptions } from './optim/adamw.js'
export { type RowGradient, RowwiseAdagrad, type RowwiseAdagradOptimizerOptions } from './optim/rowwise_adagrad.js'
export { learningRate, type ScheduleOptions } from './optim/schedule.js'
export { Philox, type PhiloxPosition } from './philox.js'
export { Random } from './random.js'
export type { QueueLimits, SubmitOptions } from './serve/admission.js'
export type { EngineState, EngineStats } from './serve/engine.js'
export { type ExportedBundle, exportBundle } from './serve/export.js'
export type { HistogramSummary } from './serve/histogram.js'
export type { ModelInfo, Timings } from './serve/messages.js'
export { type EngineOptions, type LoadProgress, Ranker, type RankerOptions, type RankResult } from './serve/ranker.js'
export type { Ids, RankHistory, RankRequest, RetrieveRequest } from './serve/request.js'
export { type RetrieveResult, Retriever } from './serve/retriever.js'
export type { Id } from './serve/vocabulary.js'
export {
  type Device,
  type DeviceMemory,
  type Dtype,
  memory,
  scope,
  setMemoryLimit,
  Tensor,
  type TensorOptions,
  type TypedArray,
  unscoped,
} from './tensor.js'
export { loadCheckpoint, saveCheckpoint } from './train/checkpoint.js'
export { type DinBaselineOptions, evaluateDin } from './train/din_baseline.js'
export { checkVocabulary, type LoadedModel, loadModel } from './train/model_checkpoint.js'
export { type TrainOptions, trainOptions } from './train/options.js'
export { type Preset, preset, presetNames } from './train/presets.js'
export { RankMetrics, type RegressionMetrics, type TaskMetrics } from './train/rank_metrics.js'
export { type RankOptions, rankOptions } from './train/rank_options.js'
export { type RankPreset, rankPreset, rankPresetNames } from './train/rank_presets.js'
export { type RankEvent, type RankerShape, RankTrainer, type RankTrainerSetting } from './train/rank_trainer.js'
export { readSafetensors, writeSafetensors } from './train/safetensors.js'
export { type StepHandle, type TrainEvent, Trainer, type TrainerSetting } from './train/trainer.js'
