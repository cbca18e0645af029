#!/usr/bin/env bash
# Real speech and two small real models, without GPU or model hub.
#   bash demo/demo.sh                  the checkpoint that comes along hears test prompts, is fine-tuned, hears them again
#   bash demo/demo.sh --pseudo-labels  the same, on what Whisper hears in the training prompts instead of their transcripts
#   bash demo/demo.sh --from-scratch   no checkpoint: makes speech, trains on it, hears prompts, within 15 minutes
# Ctrl-C stops it anywhere; started again it continues, and skips what is done. rm -r demo/exp starts over.
set -Eeuo pipefail
cd "$(dirname "$0")/.."
. demo/setup.sh
data=demo/data/train.jsonl tuned=tuned after=after
case ${1-} in
'') ;;
--from-scratch) ;;
--pseudo-labels) data=demo/exp/labels/kept.jsonl tuned=tuned-labels after=after-labels ;;
*) fail "unknown flag $1: there are --from-scratch and --pseudo-labels" ;;
esac
trap 'echo "error: the demo stopped at the last command above; started again, it continues there" >&2' ERR

out=demo/exp
models=(--llm_model_name_or_path demo/models/SmolLM2-135M-Instruct
    --whisper_model_name_or_path demo/models/whisper-tiny.en.pt)
. demo/cpu.sh
dtype=float32
if [ "$bf16" = True ]; then dtype=bfloat16; fi

say() { printf '\n== %s\n' "$*"; }

make_once() {  # make_once FILE COMMAND …: print and run the command unless FILE is there
    local file=$1
    shift
    printf '$ %s\n' "$*"
    if [ -e "$file" ]; then echo "(done before: $file)"; else "$@"; fi
}

recognize() {  # recognize CHECKPOINT MANIFEST RESULT FLAG …
    make_once "$3" python recognize.py "${models[@]}" --checkpoint "$1" --data_path "$2" --result_path "$3" \
        --batch_size 16 --dtype "$dtype" "${@:4}"
}

train() {  # train DATA FOLDER FLAG …
    make_once "$2/model.safetensors" python train.py "${models[@]}" --data_path "$1" --output_dir "$2" \
        --cache_dir "$out/cache" --spec_augment --group_by_length --bf16 "$bf16" --lr_scheduler_type cosine \
        --warmup_ratio 0.05 --logging_steps 20 --save_steps 100 --save_total_limit 2 --report_to none "${@:3}"
}

wer() { python score.py --ref "$1" --hyp "$2" --normalizer english | sed -n 's/^WER: \([0-9.]* %\).*/\1/p'; }
pairs() { python score.py --ref "$1" --hyp "$2" --per_utterance >"$out/pairs"; grep -A2 -E "$3" "$out/pairs" | cut -c1-120; }

say "Two small real models"
make_once demo/models/SmolLM2-135M-Instruct python demo/fetch_models.py
mkdir -p "$out"

if [ "${1-}" = --from-scratch ]; then
    say "Speech to learn from: three hours, synthesised (some minutes on 2 cores)"
    python demo/make_speech.py --hours 3 --out "$out/speech3h" # continues by itself
    # three of four training prompts join it, the others tell how it goes
    sed 's#"wav": "#"wav": "../data/#' demo/data/train.jsonl >"$out/prompts.jsonl"
    awk 'NR % 4 == 0' "$out/prompts.jsonl" >"$out/dev.jsonl"
    sed 's#"wav": "#"wav": "speech3h/#' "$out/speech3h/train.jsonl" >"$out/scratch.jsonl"
    awk 'NR % 4' "$out/prompts.jsonl" >>"$out/scratch.jsonl"

    say "Training from nothing: CTC over the LLM's own tokens, the whole encoder frozen (a step costs a third)"
    train "$out/scratch.jsonl" "$out/scratch" --splice tokens --projector_layers 0 --align_steps 500 --max_steps 500 \
        --per_device_train_batch_size 16 --learning_rate 2e-3

    say "What it hears"
    recognize "$out/scratch" "$out/dev.jsonl" "$out/scratch.txt" --decoder fusion
    pairs "$out/dev.jsonl" "$out/scratch.txt" '^(conf-extended|dir-welcome|vm-rec-name|vm-savefolder|digits-13):'
    printf '\n%-42s %s\n' "WER of prompts it did not train on" "$(wer "$out/dev.jsonl" "$out/scratch.txt")"
    exit
fi

test=demo/data/test.jsonl
say "At once: the checkpoint that comes along hears prompts and a voice it never heard"
recognize demo/pretrained "$test" "$out/before.txt"
pairs "$test" "$out/before.txt" '^(conf-full|is-in-use|vm-toforward|digits-day-4|tt-weasels):'

if [ "${1-}" = --pseudo-labels ]; then
    say "What Whisper hears in the 471 training prompts, whose transcripts are left aside"
    sed 's#"txt": "[^"]*", ##; s#"wav": "#"wav": "../data/#' demo/data/train.jsonl >"$out/speech.jsonl"
    make_once "$out/labels/labels.jsonl" python label.py --teacher demo/models/whisper-tiny.en.pt \
        --data_path "$out/speech.jsonl" --out "$out/labels" --suppress_numerals
    make_once "$data" python filter_labels.py --labels "$out/labels" --plain
    grep -F -f <(grep -o '"key": "[^"]*"' "$data") demo/data/train.jsonl >"$out/checked.jsonl"
    printf '%-42s %s\n' "WER of all labels" "$(wer demo/data/train.jsonl "$out/labels/labels.jsonl")" \
        "WER of the labels that were kept" "$(wer "$out/checked.jsonl" "$data")"
fi

say "Fine-tuning on the $(grep -c . "$data") training prompts"
train "$data" "$out/$tuned" --checkpoint demo/pretrained --align_steps 200 --max_steps 200 \
    --per_device_train_batch_size 16 --learning_rate 5e-4 --projector_dropout 0.1

say "The mean of it and of what it started from hears better than either (the share was chosen on the training prompts)"
make_once "$out/$tuned-mean/model.safetensors" python average.py demo/pretrained "$out/$tuned" --weights 0.35 0.65 \
    --out "$out/$tuned-mean"

say "The test prompts again: the CTC hears better now, and gets a greater weight (chosen on the training prompts, too)"
recognize "$out/$tuned-mean" "$test" "$out/$after.txt" --joint_weight 2
pairs "$test" "$out/$after.txt" '^(conf-full|is-in-use|vm-toforward|digits-day-4|tt-weasels):'

say "WER of the 70 test prompts (Whisper's English normalizer)"
for when in before after after-labels; do
    [ -e "$out/$when.txt" ] || continue
    printf '$ python score.py --ref %s --hyp %s --normalizer english\n' "$test" "$out/$when.txt"
    printf '%-12s %s\n' "$when" "$(wer "$test" "$out/$when.txt")"
done
printf '\ntranscripts: %s   loss curve: %s/curve.png   checkpoint: %s\n' "$out/$after.txt" "$out/$tuned" "$out/$tuned-mean"
echo "your own files: python recognize.py FILE.wav …"
