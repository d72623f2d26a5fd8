#!/usr/bin/env bash
# Before each `run` on the device: libraries for sm_90 from the sources as they are now, metadata, and what will travel.
set -e
cd /work/main
VEP_BUILD_CUDA=1 VEP_CUDA_ARCHS=90 .venv/bin/python setup.py -q egg_info build_ext --inplace
ls -la vllm_expert_prefetch/native/*.so vllm_expert_prefetch.egg-info/entry_points.txt
.venv/bin/python - <<'PY'
from vllm_expert_prefetch.native.library import why_not_cuda, why_not_host
print("host:", why_not_host() or "ok", "| cuda:", why_not_cuda() or "ok")
PY
{ git ls-files -co --exclude-standard; find .vllm .whl vllm_expert_prefetch/native -name '*' -type f; } | sort -u | xargs -d '\n' ls -l 2>/dev/null | awk '{s+=$5} END {printf "%.1f MiB of 64 travel\n", s/1048576}'
