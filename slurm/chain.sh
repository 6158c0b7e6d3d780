#!/usr/bin/env bash
# Pretrain -> evaluate -> export, each when the one before has ended well, in one command:
#
#   slurm/chain.sh [SBATCH OPTION ...] -- recipe=R name=N data.shards=DIR ... -- eval=emoji ... -- format=open_clip ...
#
# sbatch's options, written --KEY=VALUE (--nodes, --ntasks-per-node, --gpus-per-node, --time, --partition) are the training's and, as far as they apply, the
# evaluation's; the export is one task. runs_dir and name give run=..., out=runs/N/export unless it is given. Prints a line a job.
# A training that is queued again keeps its job id, so what depends on it waits.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

parts=("" "" "" "") part=0 # words of each part, quoted for the shell
for word in "$@"; do
  if [ "$word" = -- ]; then part=$((part + 1)); else parts[part]+=" $(printf %q "$word")"; fi
done
if [ "$part" -ne 3 ]; then
  echo "chain.sh: found $part of 3 '--': slurm/chain.sh [SBATCH OPTION ...] -- TRAIN WORDS -- EVALUATE WORDS -- EXPORT WORDS" >&2
  exit 2
fi
eval "options=(${parts[0]}) train=(${parts[1]}) evaluate=(${parts[2]}) export=(${parts[3]})"

value_of() { # value_of KEY WORD...: of the last KEY=VALUE
  local key=$1 found="" word
  shift
  for word in "$@"; do case $word in "$key="*) found=${word#*=} ;; esac; done
  echo "$found"
}
name=$(value_of name "${train[@]}") runs=$(value_of runs_dir "${train[@]}")
if [ -z "$name" ]; then
  echo "chain.sh: the training's words have no name=..., which says what to evaluate and export" >&2
  exit 2
fi
run=${runs:-runs}/$name
out=$(value_of out "${export[@]}")
[ -n "$out" ] || export+=("out=$run/export")
one=() # of the options, those that one task can have
for option in "${options[@]}"; do
  case $option in --nodes=* | --ntasks-per-node=* | --gpus-per-node=* | --ntasks=* | --gpus=* | --gres=* | -N* | -n*) ;; *) one+=("$option") ;; esac
done

submit() { # submit WHAT AFTER FILE WORD... with sbatch's options in the array `given`
  local what=$1 after=$2 id
  shift 2
  id=$(sbatch --parsable ${after:+--dependency=afterok:$after --kill-on-invalid-dep=yes} "${given[@]}" "$@")
  echo "$what ${id%%;*}" >&2
  echo "${id%%;*}"
}
given=("${options[@]}")
first=$(submit train "" "$here/train.sbatch" "${train[@]}")
second=$(submit evaluate "$first" "$here/evaluate.sbatch" "run=$run" "${evaluate[@]}")
given=("${one[@]}")
submit export "$second" "$here/export.sbatch" "run=$run" "${export[@]}" >/dev/null
