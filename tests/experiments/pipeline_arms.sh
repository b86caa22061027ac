#!/usr/bin/env bash
# What does each part of weights/make.sh give? Four arms with as many characters each, in small.
#
#   bash tests/experiments/pipeline_arms.sh [FOLDER]     # 25 minutes of one core
#
#   real      a text of 40,000 characters, 25 epochs
#   fresh     a third of the sequences from it, the rest from 400,000 characters that an ensemble
#             of three GPT twins wrote; the twins have read the 40,000 characters only
#   teacher   real, and the probabilities of the other seed's real model
#   both      fresh, and the probabilities of the other seed's fresh model
#
# The network is that of the ablations. The first 40,000 characters of the corpus, which no run
# learns, judge the arms: two tables, one for each seed, whose differences to `real` are paired. The
# text is small because the shipped model is limited by its text, too, and not by its time.
#
# Predicted, before the first run: real 2.60 nats per character; fresh -0.03, teacher -0.04, both
# -0.06; two seeds differ by 0.02. At full size, a part that gains less than 0.005 leaves make.sh.
set -euo pipefail
mkdir -p "${1:-weights/arms}"
folder=$(cd "${1:-weights/arms}" && pwd)
cd "$(dirname "$0")/../.."
python=${PYTHON:-$(uv run python -c 'import sys; print(sys.executable)')}
twin="$python tests/experiments/causal_twin.py" text=$folder/text.txt fresh=$folder/fresh.txt
network=(--n-layer 4 --n-head 4 --n-embd 192 --batch-size 8)

arm() {  # NAME SEED FLAGS...
    [ -e "$folder/$1_$2.pt" ] || "$python" training.py --weights "$folder/$1_$2.pt" --seed "$2" \
        "${network[@]}" --steps 400 --weight-decay 0.1 --eval-interval 50 "${@:3}"
}

[ -e "$text" ] || head -c 80000 data/tiny_shakespeare.txt | tail -c 40000 > "$text"
[ -e "$folder/twin_2.pt" ] || $twin --data "$text" "${network[@]}" --characters 300000 \
    --seeds 0 1 2 --weights "$folder/twin_{seed}.pt"
[ -e "$fresh" ] || $twin --data "$text" --twins "$folder"/twin_?.pt --write 400000 --out "$fresh"
for seed in 0 1; do
    arm real $seed --data "$text"
    arm fresh $seed --data "$text" "$fresh" --first-share 0.33
done
for seed in 0 1; do
    other=$((1 - seed))
    arm teacher $seed --data "$text" --teachers "$folder/real_$other.pt"
    arm both $seed --data "$text" "$fresh" --first-share 0.33 --teachers "$folder/fresh_$other.pt"
    "$python" tests/benchmarks/benchmark_likelihood.py --held-out --measures bounds --draws 8 \
        --csv "$folder/arms.csv" "$folder"/{real,fresh,teacher,both}_$seed.pt
done
