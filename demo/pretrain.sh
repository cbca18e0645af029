#!/usr/bin/env bash
# How demo/pretrained came about: bash demo/pretrain.sh. Hours on a CPU, less on a GPU; started again it continues.
# Synthetic speech alone. First CTC; then, on clips that the CTC has not heard, the LLM learns to read what it makes of them.
set -Eeuo pipefail
cd "$(dirname "$0")/.."
. demo/setup.sh
hours=${HOURS:-80} align_steps=${ALIGN_STEPS:-2400} read_steps=${READ_STEPS:-800}
data=demo/exp out=demo/exp/pretrain
if command -v nvidia-smi >/dev/null; then # 64 clips a step, by one GPU or two cores
    train=(python train.py --per_device_train_batch_size 64) bf16=True
else
    train=(torchrun --standalone --nproc_per_node=2 train.py --per_device_train_batch_size 32) bf16=False
    export OMP_NUM_THREADS=$((($(nproc) + 1) / 2))
    if grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then bf16=True; fi
fi
# without it glibc returns the memory of every batch to the system, and gets it anew page by page: up to twice as slow
export MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=200000000 MALLOC_ARENA_MAX=2
export LRU_CACHE_CAPACITY=128 # else oneDNN keeps a kernel for each shape of a batch: memory grows
models=(--llm_model_name_or_path demo/models/SmolLM2-135M-Instruct
    --whisper_model_name_or_path demo/models/whisper-tiny.en.pt)
common=("${models[@]}" --bf16 "$bf16" --group_by_length --warmup_ratio 0.05 --lr_scheduler_type cosine --logging_steps 50
    --save_steps 200 --save_total_limit 2 --report_to none --cache_dir "$data/cache" --spec_augment)

python demo/fetch_models.py
# half of the hours mostly examples of WordNet, half mostly its definitions; the last 5,000 clips are for the LLM
python demo/make_speech.py --hours $((hours / 2)) --out "$data/speech"
python demo/make_speech.py --hours $((hours - hours / 2)) --out "$data/speech1" --seed 1 --definitions 0.55
for part in speech speech1; do
    sed "s#\"key\": \"#&$part-#; s#\"wav\": \"#&$part/#" "$data/$part/train.jsonl"
done >"$data/all.jsonl"
head -n -5000 "$data/all.jsonl" >"$data/align.jsonl"
tail -n 5000 "$data/all.jsonl" >"$data/read.jsonl"
"${train[@]}" "${common[@]}" --splice tokens --data_path "$data/align.jsonl" --output_dir "$out/aligned" \
    --align_steps "$align_steps" --max_steps "$align_steps" --learning_rate 2e-3 --projector_dropout 0.15
"${train[@]}" "${common[@]}" --checkpoint "$out/aligned" --data_path "$data/read.jsonl" --output_dir "$out/trained" \
    --max_steps "$read_steps" --per_device_train_batch_size 8 --learning_rate 3e-4 --projector_dropout 0.15 --lora_r 16

python - "$out/trained" demo/pretrained <<'END' # bfloat16: half the size
import shutil, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
trained, shipped = map(Path, sys.argv[1:])
weights = load_file(trained / "model.safetensors")
save_file({name: w.to(torch.bfloat16) for name, w in weights.items()}, shipped / "model.safetensors", metadata={"format": "pt"})
shutil.copy(trained / "config.json", shipped / "config.json")
END
