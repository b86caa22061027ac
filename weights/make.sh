#!/usr/bin/env bash
# From data/tiny_shakespeare.txt alone to a diffusion model like the shipped one, and to the GPTs
# that it is compared with.
#
#   bash weights/make.sh gpu          # planned for 12 minutes of one H100
#   bash weights/make.sh cpu          # two cores: a night for student.pt, half a day for all
#   bash weights/make.sh small FOLDER # five minutes of one core: small models of all the text
#   bash weights/make.sh test FOLDER  # seconds: tiny models, to try this script
#
# All results are in weights/make/, or FOLDER. A stage whose result is there is skipped, and a run
# that was stopped goes on: after Ctrl-C, SIGTERM or a crash, give the same command again. make.tsv
# has a line for each result and attempt. The held-out slice, which training.py and causal_twin.py do
# not learn, chooses weights and temperature. The validation split is measured and chooses nothing;
# the comparison with the shipped weights, at the end, is left to the reader.
set -euo pipefail

share=0.33                                                  # of the sequences are Shakespeare's
recipe=(--learning-rate 0.008 --decay 1 --weight-decay 0.1) # of all runs but the twins'
window=256 windows=436 network=(--sequence-len 256)
case ${1:-} in
gpu)
    seeds=(0 1 2 3 4) twin=(--characters 7400000 --batch-size 64)
    pieces=1 fresh=12600000 streams=4096
    teacher=100000000 student=350000000 gpt=60000000 plain=50000000
    batch=128 interval=500 ;;
cpu)
    seeds=(0 1 2) twin=(--characters 5500000)
    pieces=4 fresh=500000 streams=192
    teacher=0 student=180000000 gpt=10000000 plain=10000000
    batch=64 interval=250 ;;
small)
    seeds=(0 1) twin=(--characters 500000 --batch-size 16)
    pieces=1 fresh=250000 streams=192
    teacher=500000 student=1000000 gpt=500000 plain=500000
    batch=8 interval=200 recipe=(--learning-rate 0.02 --decay 0.5 --weight-decay 0.1)
    window=128 windows=100 network=(--sequence-len 128 --n-layer 2 --n-head 2 --n-embd 128
                                    --no-compile) ;;
test)
    seeds=(0 1) twin=(--characters 1600 --batch-size 8)
    pieces=1 fresh=1000 streams=4
    teacher=5120 student=20480 gpt=1600 plain=5120
    batch=16 interval=4
    window=32 windows=25 network=(--sequence-len 32 --context-len 4 --n-layer 1 --n-head 1
                                  --n-embd 16 --no-compile) ;;
*)
    echo "usage: bash weights/make.sh gpu|cpu|small|test [FOLDER]" >&2
    exit 2 ;;
esac

mkdir -p "${2:-$(dirname "$0")/make}"
folder=$(cd "${2:-$(dirname "$0")/make}" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-$(uv run python -c 'import sys; print(sys.executable)')}
gpt_script=tests/experiments/causal_twin.py
text=data/tiny_shakespeare.txt shipped=weights/diffusion_model.pt
case $1 in small | test) shipped=$folder/plain.pt ;; esac  # as long windows as the others
if [ "$1" = test ]; then
    text=$folder/text.txt
    [ -e "$text" ] || head -c 8000 data/tiny_shakespeare.txt > "$text"
fi

# Running and logging ------------------------------------------------------------------------------

commit=$(git describe --always --dirty 2> /dev/null || echo unknown)
hardware=$(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null | head -n 1 ||
    sed -n 's/^model name.*: //p;T;q' /proc/cpuinfo 2> /dev/null || uname -m)
hardware="$hardware, $(getconf _NPROCESSORS_ONLN) cores"
log=$folder/make.tsv
[ -e "$log" ] || printf 'when\tresult\texit\tseconds\tsha256\tcommit\thardware\tcommand\n' > "$log"
child=

hash_of() { (sha256sum "$1" || shasum -a 256 "$1") 2> /dev/null | cut -d ' ' -f 1; }

record() {  # EXIT: a line of the log for each result of the stage
    local result
    for result in $results; do
        printf '%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n' "$(date -u +%FT%TZ)" "$result" "$1" \
            $((SECONDS - began)) "$(hash_of "$folder/$result")" "$commit" "$hardware" "$command" \
            >> "$log"
    done
}

stop() {  # the child gets the time to save its state
    trap '' INT TERM HUP
    if [ -n "$child" ]; then
        kill -TERM "$child" 2> /dev/null || true
        wait "$child" || true
        record stopped
    fi
    echo "stopped; the same command continues" >&2
    exit 143
}
trap stop INT TERM HUP

stage() {  # "RESULTS" COMMAND...; what a command prints is its result, if it writes no file
    results=$1 began=$SECONDS command="${*:2}"
    local result code=0 missing=
    for result in $results; do [ -e "$folder/$result" ] || missing=1; done
    [ -n "$missing" ] || return 0
    echo "== $results: $command" >&2
    "${@:2}" > "$folder/printed.tmp" &
    child=$!
    wait "$child" || code=$?
    child=
    cat "$folder/printed.tmp"
    [ "$code" != 0 ] || [ -e "$folder/${results%% *}" ] || cp "$folder/printed.tmp" "$folder/$results"
    rm "$folder/printed.tmp"
    record "$code"
    [ "$code" = 0 ] || exit "$code"
}

diffusion() {  # NAME CHARACTERS FLAGS...
    local flags=("${@:3}" "${recipe[@]}" "${network[@]}" --batch-size $batch
                 --steps $(($2 / batch / window)) --eval-interval $interval)
    [ ! -s "$folder/$1.state.pt" ] || flags=(--resume)
    stage "$1.pt" "$python" training.py --weights "$folder/$1.pt" "${flags[@]}"
}

gpt() {  # NAME CHARACTERS FLAGS...
    stage "$1.pt" "$python" $gpt_script --weights "$folder/$1.pt" --characters "$2" "${@:3}" \
        "${recipe[@]}" "${network[@]}" --batch-size $batch
}

# The stages ---------------------------------------------------------------------------------------

missing=() twins=() further=()
for seed in "${seeds[@]}"; do
    twins+=("$folder/twin_$seed.pt")
    [ -e "$folder/twin_$seed.pt" ] || missing+=("$seed")
done
if [ ${#missing[@]} -gt 0 ]; then
    stage "$(printf 'twin_%s.pt ' "${missing[@]}")" "$python" $gpt_script --data "$text" \
        --weights "$folder/twin_{seed}.pt" --seeds "${missing[@]}" "${twin[@]}" "${network[@]}"
fi
for ((piece = 0; piece < pieces; piece++)); do
    further+=("$folder/fresh_$piece.txt")
    stage "fresh_$piece.txt" "$python" $gpt_script --twins "${twins[@]}" --data "$text" \
        --write $fresh --streams $streams --seeds $piece --out "$folder/fresh_$piece.txt"
done
both=(--data "$text" "${further[@]}" --first-share $share)
taught=("${both[@]}")
if [ $teacher -gt 0 ]; then
    diffusion teacher $teacher "${both[@]}" --seed 1
    taught+=(--teachers "$folder/teacher.pt")
fi
diffusion student $student "${taught[@]}" --seed 2
gpt gpt_student $gpt "${both[@]}" --teachers "${twins[@]}" --seeds 2
diffusion plain $plain --data "$text" --seed 2
gpt plain_gpt $plain --data "$text" --seeds 2

stage likelihood.md "$python" tests/benchmarks/benchmark_likelihood.py --data "$text" \
    --windows $windows --csv "$folder/likelihood.csv" \
    "$folder/student.pt" "$folder/gpt_student.pt" "$shipped" \
    "$(IFS=+; echo "${twins[*]}")" "${twins[0]}" "$folder/plain_gpt.pt" "$folder/plain.pt"

cat << END
The one choice on validation text: likelihood.md compares $shipped with student.pt.
To ship it:  cp $folder/student.pt weights/diffusion_model.pt
END
