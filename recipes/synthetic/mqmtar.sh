#!/usr/bin/env bash
# MQMTAR in two runs, as the results were made: the task, then heads left out until each looks up the right key alone.
#
#     bash recipes/synthetic/mqmtar.sh own 0          # our own training distribution, seed 0
#     bash recipes/synthetic/mqmtar.sh paper 0        # the paper's
#
# On the paper's distribution the first run has half the learning rate and the batch, and the second chooses hard samples
# by their loss, weighs what is hard in them and sees them again.
#
# METHOD is the attention (default asentmax), MINUTES (3.2) and MORE_MINUTES (own 1.2, paper 6.6) are the training times,
# RUNS the folder, FLAGS go to both runs, MORE_FLAGS to the second alone, EVALUATE_FLAGS to its test; with FIRST_ONLY=1
# the first run is all (ablations.py). A run that stays on the plateau is given up: try another seed.
set -euo pipefail
if [[ ${1:---help} == --help ]]; then
    sed -n '2,/^set/{/^#/s/^# \?//p}' "$0"
    exit
fi
if (($# > 2)); then
    echo "expected a distribution and one seed, got $*" >&2
    exit 2
fi
method=${METHOD:-asentmax} distribution=$1 seed=${2:-0} out=${RUNS:-runs/synthetic}
common=(--task mqmtar --method "$method" --out "$out" --seeds "$seed" --steps 0 --corrupt 0.5 --jitter 0.4
    --key-noise 0.3 --compile --validations 1 --validate-samples 2000)
case $distribution in
own)
    first=(--near-misses 0.3 --near-misses-end 1 --one-letter-end 0.25)
    more_minutes=1.2
    second=(--lr 3e-4 --near-misses 1 --near-misses-end 1 --one-letter 0.25 --one-letter-end 0.25 --near-crossed 0.3
        --swapped 0.2)
    ;;
paper)
    more_minutes=6.6
    first=(--lr 5e-4 --batch 512)
    second=(--lr 4e-4 --jitter 0.05 --jitter-law log --replay 0.25 --hard-candidates 4 --hard-from 0 --hard-weight 0.3)
    ;;
*)
    echo "expected own or paper, got $distribution" >&2
    exit 2
    ;;
esac
train=recipes/synthetic/train.py name=mqmtar-$method-nape-$distribution
# shellcheck disable=SC2086  # FLAGS are several words
"${PYTHON:-python3}" "$train" "${common[@]}" "${first[@]}" --name "$distribution-first" --ease-in 1500 --decay 0.25 \
    --minutes "${MINUTES:-3.2}" --give-up 3000000 ${FLAGS:-}
if [[ -n ${FIRST_ONLY:-} ]]; then
    exit
fi
# shellcheck disable=SC2086
"${PYTHON:-python3}" "$train" "${common[@]}" --name "$distribution" --ease-in 300 --warmup 100 --decay 1 --head-drop 0.75 "${second[@]}" \
    --start-from "$out/$name-first/seed$seed" --minutes "${MORE_MINUTES:-$more_minutes}" ${FLAGS:-} \
    ${MORE_FLAGS:-}
# shellcheck disable=SC2086
"${PYTHON:-python3}" recipes/synthetic/evaluate.py "$out/$name" ${EVALUATE_FLAGS:-}
