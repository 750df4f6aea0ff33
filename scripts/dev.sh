#!/usr/bin/env bash
# Builds some of the attention kernels for GPUs and runs them on the emulator, where there is no GPU either.
#
#   scripts/dev.sh bf16_d64                     instances whose name contains this, on every case
#   scripts/dev.sh backward_bf16_d64            backward ones
#   scripts/dev.sh bf16_d64 --case causal       options of tests/emulated/attention_driver.h
#   scripts/dev.sh sm80 --every 10 --runs 1
#
# The first run also builds the emulator.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ $# -eq 0 || "$1" == -* ]]; then
  sed -n '2,9s/^# \{0,1\}//p' scripts/dev.sh >&2
  exit 2
fi
export PATH="$PWD/.venv/bin:$PATH"
filter="$1"
dtype="$(grep -oE 'fp16|bf16' <<< "$filter" || true)"
head_dim="$(grep -oE 'd[0-9]+' <<< "$filter" | tr -d d || true)"
arch="$(grep -oE 'sm(75|80)' <<< "$filter" || true)"
direction="$(grep -oE 'forward|backward' <<< "$filter" || true)"
lines="${arch:-sm[0-9]+}, ${direction:-[a-z]+}, ${dtype:-[a-z0-9]+}, ${head_dim:-[0-9]+}," # of instances.def
build=build/dev_kernels
cmake -G Ninja -S . -B "$build" -DANYFLASH_TORCH=OFF -DANYFLASH_TESTS=ON \
  -DANYFLASH_CUDA_ARCHS="75;80" -DANYFLASH_ONLY="$lines" > /dev/null
cmake --build "$build" --target emulate_attention
"$build/tests/emulated/emulate_attention" --instance "$filter" "${@:2}"
