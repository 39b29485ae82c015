import type { Command } from './args.js'
import { engineSpecs } from './engine_options.js'

/** One option of a command. */
export interface OptionSpec {
  /** What stands for the value in the help; without it the option is a flag. */
  value?: string
  text: string
  choices?: readonly string[]
  required?: boolean
  /** May be given several times. */
  many?: boolean
}

const json: OptionSpec = { text: 'one JSON document on stdout instead of text' }
const device: OptionSpec = { value: 'NAME', text: 'where to compute; default auto', choices: ['auto', 'cpu', 'cuda'] }
const filterSeen: OptionSpec = {
  value: 'WHICH',
  text: 'items left out of the ranking',
  choices: ['history', 'all', 'none'],
}

const reading: Record<string, OptionSpec> = {
  times: { value: 'FILE', text: 'sequence files: the file with the times' },
  format: {
    value: 'NAME',
    text: 'default by name or first line',
    choices: ['recbole', 'movielens-dat', 'movielens-csv', 'amazon-csv', 'sequence', 'csv', 'parquet', 'jsonl'],
  },
  mapping: { value: 'MAP', text: 'columns of other tables by name or number: user=..,item=..[,time=..][,rating=..]' },
  'min-actions': { value: 'N', text: 'users with fewer actions are skipped; default 3' },
}

const data: Record<string, OptionSpec> = {
  data: { value: 'FILE', text: 'actions of users: .inter, ratings.dat, .csv, .txt, .parquet, .jsonl', required: true },
  ...reading,
}

const ranking: Record<string, OptionSpec> = {
  preset: { value: 'NAME', text: 'ranking/ml-100k, for example; a wrong name lists all', required: true },
  data: { value: 'FOLDER', text: "the preset's files; its records are made in --out once" },
  requests: { value: 'FOLDER', text: 'records of hstu data prepare in their place' },
  out: { value: 'FOLDER', text: 'run folder', required: true },
  task: { value: 'TASK', text: 'such as "like = LIKE once"; default those of the records', many: true },
  passes: { value: 'N', text: 'over the first 80 % of the requests; default 1' },
  seed: { value: 'N', text: 'of weights and dropouts; default 0' },
  'batch-size': { value: 'N', text: 'requests a step' },
  lr: { value: 'X', text: 'learning rate; default 0.001' },
  precision: {
    value: 'NAME',
    text: 'compute in float32 (default) or, on CUDA, bf16',
    choices: ['float32', 'bf16'],
  },
  'stochastic-length': { value: 'ALPHA', text: 'in (1, 2]: shorten long histories in training; default 0, off' },
  set: { value: 'KEY=VALUE', text: 'any training option, such as supervise=history or maxHistory=200', many: true },
  'model-set': { value: 'KEY=VALUE', text: 'any option of the model, such as fusion=add', many: true },
  device,
  json,
}

/** Every command. The modules behind them, and with them the addon, are loaded by the command that is run. */
export const commands: readonly Command[] = [
  {
    name: 'demo',
    summary: 'train SASRec and HSTU on the embedded stream and compare them with the best possible ranking',
    options: {
      seed: { value: 'N', text: 'of the stream, the weights and the negatives; default 1' },
      records: { value: 'N', text: 'length of the stream; default 40000' },
      out: { value: 'FOLDER', text: 'where report.json and curve.svg go; default runs/demo' },
      device,
      json,
    },
    example: 'hstu demo --out runs/demo',
    load: () => import('./demo.js'),
  },
  {
    name: 'train',
    summary: 'train a model on a file of actions, test it, and keep the best parameters',
    options: {
      ...data,
      preset: { value: 'NAME', text: 'model and recipe, such as ml-100k/hstu; a wrong name lists all' },
      out: { value: 'FOLDER', text: 'run folder; default runs/<preset>' },
      resume: { text: 'go on with the run in --out, exactly where it was' },
      seed: { value: 'N', text: 'of weights, shuffles, dropouts, negatives; default 0' },
      epochs: { value: 'N', text: 'default by the preset' },
      'batch-size': { value: 'N', text: 'users a step; default 128' },
      lr: { value: 'X', text: 'learning rate; default 0.001' },
      precision: {
        value: 'NAME',
        text: 'compute in float32 (default) or, on CUDA, bf16',
        choices: ['float32', 'bf16'],
      },
      patience: { value: 'N', text: 'stop after N evaluations without a better NDCG@10; 0: never' },
      'evaluate-every': { value: 'N', text: 'epochs between evaluations; 0: only at the end' },
      split: {
        value: 'NAME',
        text: 'valid holds out two actions a user; paper one, and chooses the epoch on test',
        choices: ['valid', 'paper'],
      },
      'filter-seen': filterSeen,
      set: { value: 'KEY=VALUE', text: 'any training option, such as negatives=full or clipNorm=1', many: true },
      'model-set': { value: 'KEY=VALUE', text: 'any option of the model, such as layers=4', many: true },
      device,
      json,
    },
    example: 'hstu train --data ml-100k.inter --preset ml-100k/hstu --seed 0 --out runs/ml100k',
    load: () => import('./train.js'),
  },
  {
    name: 'eval',
    summary: 'rank the held-out actions with a trained model',
    options: {
      checkpoint: { value: 'FOLDER', text: 'run folder, or its best/', required: true },
      ...data,
      stage: { value: 'NAME', text: 'which held-out action; default test', choices: ['test', 'valid'] },
      'filter-seen': { ...filterSeen, text: 'items left out of the ranking; default as in training' },
      device,
      json,
    },
    example: 'hstu eval --checkpoint runs/ml100k --data ml-100k.inter',
    load: () => import('./eval.js'),
  },
  {
    name: 'recommend',
    summary: 'the best next items of users',
    options: {
      checkpoint: { value: 'FOLDER', text: 'run folder, or its best/', required: true },
      ...data,
      user: { value: 'ID', text: 'user id as in the file; may be given several times', required: true, many: true },
      k: { value: 'N', text: 'how many items; default 10' },
      items: { value: 'FILE', text: 'titles: RecBole .item, MovieLens movies.dat or movies.csv' },
      time: { value: 'SECONDS', text: 'when the users ask; default the time of their last action' },
      'filter-seen': { ...filterSeen, text: 'items left out; default history' },
      device,
      json,
    },
    example: 'hstu recommend --checkpoint runs/ml100k --data ml-100k.inter --user 196 --items ml-100k.item',
    load: () => import('./recommend.js'),
  },
  {
    name: 'rank train',
    summary:
      'train a generative ranker on request records in the order of time, predicting each before learning from it',
    options: {
      ...ranking,
      resume: { text: 'go on with the run in --out, exactly where it was' },
      baselines: {
        value: 'WHICH',
        text: 'in the report: online (default), all (with DIN, which takes minutes), none',
        choices: ['online', 'all', 'none'],
      },
    },
    example: 'hstu rank train --preset ranking/ml-100k --data $HSTU_DATA/ml-100k --out runs/rank',
    load: () => import('./rank_train.js'),
  },
  {
    name: 'rank ablate',
    summary: "train a preset's ranker with one thing changed at a time: fusion, supervised positions, time bias",
    options: ranking,
    example: 'hstu rank ablate --preset ranking/ml-100k --data $HSTU_DATA/ml-100k --out runs/ablate',
    load: () => import('./rank_ablate.js'),
  },
  {
    name: 'rank eval',
    summary: 'predict request records with a trained ranker without learning from them',
    options: {
      checkpoint: { value: 'FOLDER', text: 'run folder', required: true },
      requests: { value: 'FOLDER', text: 'the records that the run was trained on; default those in the run folder' },
      from: { value: 'N', text: 'first request; default the first that the run has not learnt from, or the last 20 %' },
      json,
    },
    example: 'hstu rank eval --checkpoint runs/rank',
    load: () => import('./rank_eval.js'),
  },
  {
    name: 'rank score',
    summary: 'score candidates with a bundle: a request a line in, its scores a line out',
    options: {
      ...engineSpecs,
      in: {
        value: 'FILE',
        text: 'JSON lines {user, history: {items, times, actions}, candidates, context, time, id}; default stdin',
      },
      'unknown-ids': {
        value: 'WHAT',
        text: 'default unknown-row, counted in the answer',
        choices: ['error', 'unknown-row'],
      },
      device,
    },
    example: 'hstu rank score --bundle bundles/rank --in requests.jsonl',
    load: () => import('./rank_score.js'),
  },
  {
    name: 'bench serve',
    summary: 'offer a bundle more and more load: latencies and what is answered within a bound, cold, cached and mixed',
    options: {
      ...engineSpecs,
      bundle: { value: 'FOLDER', text: 'from hstu export' },
      synthetic: { value: 'SIZE', text: 'a ranker of random parameters in its place', choices: ['small', 'large'] },
      rate: { value: 'X', text: 'requests a second offered; default .5, .8, 1 and 10 times what the engine can do' },
      bound: { value: 'MS', text: 'deadline of each request; default 80' },
      seconds: { value: 'X', text: 'of each load; default 5' },
      users: { value: 'N', text: 'default 1000' },
      zipf: { value: 'X', text: 'exponent of their popularity; default 1' },
      history: { value: 'N', text: 'rows of a history at first; default half of max-history' },
      growth: { value: 'X', text: 'events of a user between two requests (mixed); default 2' },
      candidates: { value: 'N', text: 'of a request; default 256' },
      seed: { value: 'N', text: 'of users, histories and arrivals; default 0' },
      device,
      json,
    },
    example: 'hstu bench serve --bundle bundles/rank --bound 50',
    load: () => import('./bench_serve.js'),
  },
  {
    name: 'export',
    summary: 'write what a service needs of a trained model into one folder: a bundle',
    options: {
      checkpoint: { value: 'FOLDER', text: 'run folder of hstu rank train or hstu train', required: true },
      requests: { value: 'FOLDER', text: 'the records that a ranker was trained on; default those in the run folder' },
      out: { value: 'FOLDER', text: 'where the bundle goes; one that is there is replaced as a whole', required: true },
      json,
    },
    example: 'hstu export --checkpoint runs/rank --out bundles/rank',
    load: () => import('./export.js'),
  },
  {
    name: 'data prepare',
    summary: 'turn logs of events into Parquet shards of request records for ranking',
    options: {
      mapping: { value: 'FILE', text: 'JSON: which columns of which logs are what' },
      preset: { value: 'NAME', text: 'ranking/deskdrop, ranking/ml-100k or ranking/synthetic in place of a mapping' },
      data: { value: 'FOLDER', text: "a preset's files" },
      out: { value: 'FOLDER', text: 'where the shards go', required: true },
      replace: { text: 'replace the prepared folder that is there' },
      'max-history': { value: 'N', text: 'entries kept of a history; default as mapped, or 1024' },
      memory: { value: 'SIZE', text: 'of the database before it spills to disk; default 800MB' },
      set: {
        value: 'KEY=VALUE',
        text: 'ranking/synthetic: users, items, categories, days, candidates, seed',
        many: true,
      },
      json,
    },
    example: 'hstu data prepare --preset ranking/ml-100k --data $HSTU_DATA/ml-100k --out runs/requests',
    load: () => import('./data_prepare.js'),
  },
  {
    name: 'data inspect',
    summary: 'counts, lengths, times and what is odd about a file of actions or a folder of request records',
    positionals: ['FILE'],
    options: { ...reading, top: { value: 'N', text: 'popular items listed; default 10' }, json },
    example: 'hstu data inspect interactions.csv --mapping user=person_id,item=content_id,time=timestamp',
    load: () => import('./inspect.js'),
  },
  {
    name: 'doctor',
    summary: 'what this installation consists of and what it can do',
    options: { json },
    example: 'hstu doctor',
    load: () => import('./doctor.js'),
  },
  {
    name: 'selftest',
    summary: 'check every op of the addon on this host against its formula',
    options: {
      filter: { value: 'TEXT', text: 'only ops whose name contains it' },
      device: { ...device, text: 'default cpu', choices: ['cpu', 'cuda'] },
      json,
    },
    example: 'hstu selftest --filter attention',
    load: () => import('./selftest.js'),
  },
]
