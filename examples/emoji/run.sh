#!/usr/bin/env bash
# The whole pipeline on 11,092 pairs, to be read from top to bottom. `make demo` runs it.
#
#   STEPS=1000  optimizer steps of each training run (256 pairs each)
#   SEEDS="0"   training seeds; "0 1 2" shows the spread and takes three times as long to train
#   OUT=runs/demo
#
# Killed, or run twice, it goes on where it was: every stage finds what is already there.
set -euo pipefail
cd "$(dirname "$0")/../.."

STEPS=${STEPS:-1000} SEEDS=${SEEDS:-0} OUT=${OUT:-runs/demo}
POOL=examples/emoji/pool
export WANDB_MODE=${WANDB_MODE:-offline} WANDB_SILENT=true
mkdir -p "$OUT"
SAMPLES=$((STEPS * 256))

stage() { # stage NAME COMMAND...: run it, and add its seconds to the books
  local name=$1 start=$SECONDS
  shift
  printf '\n== %s\n' "$name" >&2
  "$@"
  echo "$name $((SECONDS - start))" >>"$OUT/seconds.txt"
}
train() { # train NAME SHARDS SEED
  python -m pipeline.train recipe=emoji name="$1" runs_dir="$OUT" data.shards="$2" seed="$3" \
    tokenizer.path="$OUT/tokenizer" samples_seen="$SAMPLES" schedule.warmup_samples=$((SAMPLES / 10)) \
    'callbacks=[default,pictures]' callbacks.pictures.every_samples=$((SAMPLES / 2))
}
evaluate() { # evaluate NAME: its numbers, also on its page
  python -m pipeline.evaluate run="$OUT/$1" eval=emoji
  python -m pipeline.report run="$OUT/$1"
}
first=${SEEDS%% *}

# 1. The pool as it is, as shards: what a run without curation would train on.
stage pack_raw python -m curation.run dataset=raw pool=$POOL out="$OUT/raw" cache="$OUT/cache"

# 2. What the captions themselves tell: a vocabulary of byte pairs; the list of metadata entries (WordNet and the pool's
#    own frequent words); the phrases that hang on many captions and say nothing ("free download").
stage tokenizer python -m pipeline.data.train_tokenizer --shards "$OUT/raw" --vocab-size 3000 \
  --out "$OUT/tokenizer"
stage entries python -m curation.metadata.build --lower-case --output "$OUT/entries.json" \
  --captions "$OUT"/raw/shard-*.parquet
stage phrases python -m curation.metadata.boilerplate --output "$OUT/phrases.json" \
  --captions "$OUT"/raw/shard-*.parquet

# 3. The baseline: a model of the uncurated pool. It is also the proxy that scores the pool.
stage train_raw train "raw-seed$first" "$OUT/raw" "$first"

# 4. Curation: annotate every pair, select with reasons, pack.
stage curate python -m curation.run dataset=emoji pool=$POOL out="$OUT/curated" cache="$OUT/cache" \
  annotate.entries.entries="$OUT/entries.json" annotate.embed.run="$OUT/raw-seed$first" \
  annotate.strip_boilerplate.phrases="$OUT/phrases.json"

# 5. The same training, as many pairs seen, on what was kept.
stage train_curated train "curated-seed$first" "$OUT/curated" "$first"

# 6. More seeds, if asked for.
for seed in $SEEDS; do
  [ "$seed" = "$first" ] && continue
  stage train_raw train "raw-seed$seed" "$OUT/raw" "$seed"
  stage train_curated train "curated-seed$seed" "$OUT/curated" "$seed"
done

# 7. Numbers: 1,190 classes, one drawing each by a family that the pool does not hold.
for seed in $SEEDS; do
  stage evaluate evaluate "raw-seed$seed"
  stage evaluate evaluate "curated-seed$seed"
done

# 8. What others load.
stage export python -m pipeline.export run="$OUT/curated-seed$first" format=transformers \
  out="$OUT/export-transformers"

# 9. One table, one page.
python examples/emoji/summarise.py --out "$OUT" --seeds $SEEDS
