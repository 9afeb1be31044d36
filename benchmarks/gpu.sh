#!/usr/bin/env bash
# What only a GPU can tell, in one call of under ten minutes, without a network:
#
#   benchmarks/gpu.sh [DIRECTORY]          results go to DIRECTORY (default: gpu-results)
#   PYTHON=... SIZES=... benchmarks/gpu.sh
#
# Needs Python with torch >= 2.11, triton, pytest; builds the C++ extension where a compiler is.
# DIRECTORY gets one file of benchmark rows, <device>.jsonl (for benchmarks/results/), and a log a
# step. A step that fails or runs out of time does not stop the next; the exit status says if any did.

set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
sizes=${SIZES:-4096,16384,32768}
out=$(mkdir -p "${1:-gpu-results}" && cd "${1:-gpu-results}" && pwd)
failed=0

# step NAME SECONDS COMMAND...
step() {
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  [ $status -eq 0 ] || failed=1
  printf '%-14s %4d s  %s\n' "$name" $((SECONDS - begin)) \
    "$([ $status -eq 0 ] && tail -n 1 "$out/$name.log" || echo "FAILED ($status), see $name.log")"
}

pytest() { echo "$python" -m pytest -p no:cacheprovider -q "$@"; }

step device 10 nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv,noheader
step build 60 env MMKERN_BUILD=auto "$python" setup.py build_ext --inplace
step info 30 "$python" -m mmkern.cli info

# Operators on CUDA in every dtype, then the launchers' corners (bands, redone programs, NaN).
step operators 60 $(pytest tests/ops/test_info_nce.py tests/ops/test_sigmoid_contrastive.py) -k cuda
step kernels 30 $(pytest tests/ops/triton_kernels.py)
step head 40 $(pytest tests/ops/test_linear_cross_entropy.py) -k cuda
step attention 40 $(pytest tests/ops/test_attention.py tests/ops/triton_attention.py) \
  -k "cuda or not (reference or cpp)"
step query 30 $(pytest tests/ops/test_query_info_nce.py) -k cuda

# Reads and writes out of bounds, and races, on sizes that are no multiple of a tile.
small="one_by_one or output_mask or (tiles and large-descriptors)"
for tool in memcheck racecheck; do
  step $tool 30 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool $tool --error-exitcode 9 $(pytest tests/ops/triton_kernels.py) -k "$small"
  step $tool-attention 15 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool $tool --error-exitcode 9 $(pytest tests/ops/triton_attention.py) \
    -k "random_intervals or readers_with or nan_reaches or (every_tile and 16)"
  step $tool-query 15 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool $tool --error-exitcode 9 $(pytest tests/ops/test_query_info_nce.py) \
    -k "cuda and (no_negative or (sizes and (33 or 20)))"
done

# Calibrates first. --seconds bounds the rounds of a case; 1,048,576 pairs are ours alone.
bench="--device cuda --record --results $out --seconds 0.5"
step benchmarks 60 $(pytest benchmarks) $bench --sizes "$sizes" -k "not float32 and not attention and not query"
step bench-attention 30 $(pytest benchmarks/ops/attention.py) $bench -k "not float32"
step head-benchmarks 30 $(pytest benchmarks/ops/linear_cross_entropy.py) $bench -k "bfloat16"
step bench-query 20 $(pytest benchmarks/ops/query_info_nce.py) $bench -k "bfloat16 and not 32768"
step million 30 $(pytest benchmarks/ops/info_nce.py) $bench -k "1048576"

grep -h -A 200 'time, memory and error' "$out"/{benchmarks,bench-attention,head-benchmarks,bench-query,million}.log 2>/dev/null
exit $failed
