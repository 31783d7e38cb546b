#!/usr/bin/env bash
# Fine-tune a checkpoint: ./run_finetune.sh [MODEL [task ...]] [--key value ...]
#   no MODEL: runs/quickstart-bert on the built-in tasks, beside random weights (recipes/quickstart/finetune.yaml)
#   a MODEL:  the tasks named, or all of GLUE, under the cramming protocol (recipes/glue/finetune.yaml)
# What follows the task names is passed on to scripts/finetune.py. A relative path is taken from where you are.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
caller=$PWD
model="" tasks=()
while [ $# -gt 0 ] && [[ $1 != -* ]]; do
    if [ -z "$model" ]; then model=$1; else tasks+=("$1"); fi
    shift
done
# A model that is not there as a directory may be a Hub id, and goes through as it is.
absolute() { if [[ $1 != /* && $1 != null ]]; then echo "$caller/$1"; else echo "$1"; fi; }
absolute_model() { if [[ -d $caller/$1 ]]; then absolute "$1"; else echo "$1"; fi; }
flags=() kind=
for word in "$@"; do
    if [[ $word == --* ]]; then  # --task-data-dir is --task_data_dir
        key=${word%%=*}
        rest=${word#"$key"} key=${key#--}
        word=--${key//-/_}$rest
    fi
    case $kind$word in
        --*_dir=*|--*_file=*) word="${word%%=*}=$(absolute "${word#*=}")" ;;
        --model_name_or_path=*) word="${word%%=*}=$(absolute_model "${word#*=}")" ;;
        "directory "*) word=$(absolute "$word") ;;
        "model "*) word=$(absolute_model "$word") ;;
    esac
    if [[ $word == --task_file* && ${#tasks[@]} -gt 0 ]]; then
        echo "The tasks ${tasks[*]} and --task_file are given; it is one or the other: leave one out." >&2
        exit 1
    fi
    case $word in
        --*_dir|--*_file) kind="directory " ;;
        --model_name_or_path) kind="model " ;;
        *) kind= ;;
    esac
    flags+=("$word")
done

cd "$here"
python=python
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
if [ -z "$model" ]; then
    exec "$python" scripts/finetune.py recipes/quickstart/finetune.yaml ${flags[@]+"${flags[@]}"}
fi
names=$(IFS=,; echo "${tasks[*]-}")
exec "$python" scripts/finetune.py recipes/glue/finetune.yaml --model_name_or_path "$(absolute_model "$model")" \
    ${names:+--task_names "$names"} ${flags[@]+"${flags[@]}"}
