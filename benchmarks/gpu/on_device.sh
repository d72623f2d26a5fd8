#!/usr/bin/env bash
# One call's worth of `make gpu-check` on a GPU machine that is lent for a while: goes on where the last call stopped.
#
#   benchmarks/gpu/on_device.sh MINUTES FOLDER [arguments of gpu_check.py]
#
# vLLM must be importable (a vLLM built for this machine on PYTHONPATH), with torch, pytest, a C++20 compiler and nvcc.
# What there is after MINUTES comes to FOLDER as gpu-results.tar.gz, also when a step hangs. Unpack it into
# benchmarks/results/NAME and run `gpu_check.py --report --out benchmarks/results/NAME` for the page and the pictures.
set -u
minutes=${1:?MINUTES}
folder=${2:?FOLDER}
shift 2
cd "$(dirname "$0")/../.." || exit 1
results=build/gpu-results
mkdir -p "$results"
PYTHONUNBUFFERED=1 timeout --kill-after 5 "$((minutes * 60 + 20))" \
    "${PYTHON:-python3}" benchmarks/gpu/gpu_check.py --out "$results" --minutes "$minutes" "$@" 2>&1 |
    tee "$results/log.txt"
status=${PIPESTATUS[0]}
tar -czf "$folder/gpu-results.tar.gz" -C "$results" --exclude checkpoints .
exit "$status"
