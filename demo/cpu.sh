# Sourced by demo/demo.sh and demo/pretrain.sh: how a CPU trains best.
bf16=False # processors without bfloat16 units are slower with it
if grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null; then bf16=True; fi
# else glibc returns the memory of every batch to the system, and gets it anew page by page: up to twice as slow
export MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=200000000 MALLOC_ARENA_MAX=2
export LRU_CACHE_CAPACITY=128 # else oneDNN keeps a kernel for each shape of a batch: memory grows
export OMP_WAIT_POLICY=passive # else threads wait for one another by spinning: beside another program, many times slower
