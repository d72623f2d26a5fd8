#!/usr/bin/env bash
# One sitting of `make gpu-check` on a GPU machine without network: goes on where the last one stopped.
#
#   benchmarks/gpu/on_device.sh MINUTES FOLDER [arguments of gpu_check.py]
#
# vLLM must be importable (a vLLM built for this machine on PYTHONPATH), with torch and pytest. Libraries that were built
# elsewhere from the same sources, and metadata beside them (setup.py egg_info), are used as they are; else a C++20
# compiler and nvcc build them. What there is comes to FOLDER as gpu-results.tar.gz, after every step and also when one
# hangs. Unpack it into build/gpu-results before the next sitting on another machine, and into benchmarks/results/NAME for
# `gpu_check.py --report --out benchmarks/results/NAME`, which makes the page and the pictures.
set -u
minutes=${1:?MINUTES}
folder=${2:?FOLDER}
shift 2
cd "$(dirname "$0")/../.." || exit 1
results=build/gpu-results
mkdir -p "$results"

pack() {
    tar -czf "$folder/gpu-results.new" -C "$results" --exclude checkpoints . &&
        mv "$folder/gpu-results.new" "$folder/gpu-results.tar.gz"
}

while sleep 10; do pack; done &
packing=$!
PYTHONUNBUFFERED=1 timeout --kill-after 5 "$((minutes * 60 + 20))" \
    "${PYTHON:-python3}" benchmarks/gpu/gpu_check.py --out "$results" --minutes "$minutes" "$@" 2>&1 |
    tee "$results/log.txt" | grep -v '^{"device"' # the JSON, which lies in the archive
status=${PIPESTATUS[0]}
kill "$packing"
wait "$packing" 2>/dev/null
pack
exit "$status"
