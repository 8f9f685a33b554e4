#!/bin/bash
# study.sh WHEELS [SECONDS] [DRY]: kvpress beside kvlab. cwd: the repo; GGUF files in $M (/tmp/m); writes $OUT/press.tgz.
# ONLY=REGEX: of job names (losses, ours, theirs, prefill, decode, coarse, budgets); default all.
# G0, G1: the GPU of what is not timed and of what is.
# WHEELS: folder of the wheels. SECONDS: all is over by then (default 540). DRY=1: tiny, for a try.
W=$1; END=$(( $(date +%s) + ${2:-540} )); DRY=${3:-0}
R=${R:-/tmp/press}; M=${M:-/tmp/m}; OUT=${OUT:-/tmp/out}; PY=${PY:-python3}
mkdir -p $R/rows $R/log $R/fp32 $OUT
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
QWEN=$R/fp32/qwen2.5-coder-0.5b-instruct; SMOL=$R/fp32/smollm2-135m-instruct; ENV=$R/env; P=experiments/press
GPUS=$($PY -c 'import torch; print(torch.cuda.device_count())'); G0=${G0:-0}; G1=${G1:-$(( GPUS > 1 ? 1 : 0 ))}
LENGTH=4096; ITEMS=20; DTYPE=bfloat16; BOOKS=3; CONTEXT=1024; KEPT="0.75 0.5 0.25 0.125"; PERCENT="50 25 10"
LM=""; HBT=4096; HBD=4; DECODE="--tokens 32768 --rows 1 8"; TASKS="niah_single_1 niah_multikey_1 passkey"
[ $DRY = 1 ] && { LENGTH=300; ITEMS=1; DTYPE=float32; BOOKS=1; CONTEXT=256; KEPT=0.25; PERCENT=50; LM="snapkv window"; HBT=1024; HBD=1; DECODE="--small --tokens 512 --chunk 256 --rows 1"; TASKS=passkey; QWEN=$SMOL; }
left() { echo $(( END - $(date +%s) )); }
say() { echo "[$(left) s left] $*"; }
# job NAME GPU LIMIT COMMAND...: in the background, its log to a file, its end told.
job() { local n=$1 g=$2 l=$3; shift 3; [[ $n =~ ${ONLY:-.} ]] || { true & return; }; ( t=$(left); [ $t -gt $l ] && t=$l; [ $t -lt 5 ] && exit
  CUDA_VISIBLE_DEVICES=$g timeout -k 5 $t "$@" >$R/log/$n.log 2>&1; c=$?; say "$n ended: $c"; [ $c = 0 ] || tail -c 400 $R/log/$n.log ) &
  [ $DRY = 0 ] || wait $!; }
pack() { tar czf $R/press.tgz -C $R rows log $(cd $R; ls -d hb-* 2>/dev/null) && cp $R/press.tgz $OUT/press.tgz; }
bash $P/wheels.sh $ENV $W $PY || exit 1
say "wheels installed"
convert() { $PY -c "
import os, sys, torch; from pathlib import Path; from kvlab.model.gguf_convert import convert
os.symlink(convert(Path(sys.argv[1]), torch.float32).folder, sys.argv[2])" $M/$1.gguf $R/fp32/$1; }
[ -e $SMOL ] || convert smollm2-135m-instruct & a=$!
[ -e $QWEN ] || convert qwen2.5-coder-0.5b-instruct & b=$!
wait $a $b
$ENV/bin/python -c 'import kvpress, transformers; print("kvpress with transformers", transformers.__version__)'
say "models converted"
( while sleep 30; do pack; done ) & packer=$!
B="$PY $P/beside.py $QWEN --env $ENV --length $LENGTH --items $ITEMS --new-tokens 14 --dtype $DTYPE --more --kept $KEPT --tasks $TASKS"
L="$PY $P/losses.py"; LO="--env $ENV --books $BOOKS --context $CONTEXT --kept $PERCENT"
work=()
# GPU 0: losses of both models, tasks of ours and theirs.
[ $DRY = 1 ] || { job losses-q $G0 400 $L $QWEN $LM $LO --out $R/rows/losses-q.jsonl; work+=($!); }
job losses-s $G0 400 $L $SMOL $LM $LO --out $R/rows/losses-s.jsonl; work+=($!)
n=0; for ms in "snapkv" "snapkv adakv|expected_attention" "tova|window" "key_diff|attention_mass" "kvzip adakv" "lagkv|compactor|random"; do
  IFS='|' read -ra m <<<"$ms"; n=$((n+1))
  job ours-$n $G0 900 $B --only kvlab --methods "${m[@]}" --out $R/rows/ours-$n.jsonl; work+=($!)
done
n=0; for ms in "snapkv|expected_attention|tova" "key_diff|attention_mass|lagkv" "kvzip adakv" "snapkv adakv|window|compactor|random"; do
  IFS='|' read -ra m <<<"$ms"; n=$((n+1))
  job theirs-$n $G0 900 $B --only kvpress --methods "${m[@]}" --out $R/rows/theirs-$n.jsonl; work+=($!)
done
# GPU 1: first what is timed, alone, then coarser ones of ours and budgets by head.
(
  job prefill-kvpress $G1 80 $PY $P/beside.py $QWEN --env $ENV --length $LENGTH --items $(( ITEMS > 6 ? 6 : ITEMS )) --dtype $DTYPE --more --kept 0.25 --tasks niah_single_1 --only kvpress --time --out $R/rows/prefill-kvpress.jsonl; wait $!
  job prefill-kvlab $G1 120 $PY $P/beside.py $QWEN --env $ENV --length $LENGTH --items $(( ITEMS > 6 ? 6 : ITEMS )) --dtype $DTYPE --more --kept 0.25 --tasks niah_single_1 --only kvlab --time --out $R/rows/prefill-kvlab.jsonl; wait $!
  job decode $G1 120 $PY experiments/head_budgets/decode.py $DECODE --out $R/rows/decode.json; wait $!
  all=()
  C=("layer" "all" "layer, blocks of 4" "layer, blocks of 16" "all, blocks of 16")
  for m in snapkv expected_attention; do
    job coarse-$m $G1 900 $B --only kvlab --methods $m --grains "${C[@]}" --kept 0.5 0.25 --out $R/rows/coarse-$m.jsonl; all+=($!)
  done
  for s in s:smollm2_135m:smollm2-135m-instruct q:qwen2_5_coder_0_5b:qwen2.5-coder-0.5b-instruct; do
    IFS=: read k model file <<<"$s"; [ $DRY = 1 ] && [ $k = q ] && continue
    V=""; for p in 50 25 10; do for b in "" " budget=adakv" " budget=pyramid" " budget=adakv budget.layers=pyramid" " budget=duo budget.gates=$R/gates-$k.json"; do
      V="$V,\"policy=snapkv cache.budget_percent=$p$b\""; done; [ $DRY = 1 ] && break; done
    job budgets-$k $G1 400 bash -c "$PY -m kvlab.model.gates $M/$file.gguf $R/gates-$k.json && $PY -m kvlab experiment=head_budgets model=$model model.path=$M/$file.gguf eval.documents=$HBD eval.tokens=$HBT 'variants=[${V:1}]' hydra.run.dir=$R/hb-$k track=none"; all+=($!)
  done
  wait "${all[@]}"
) & work+=($!)
wait "${work[@]}"
kill $packer; pack
say "all ended"; $PY $P/table.py $R/rows/*.jsonl --out $R/table.md; wc -c $OUT/press.tgz; cut -c1-400 $R/rows/decode.json 2>/dev/null | head -20; head -c 9000 $R/table.md
