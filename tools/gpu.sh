#!/usr/bin/env bash
# What can be built, tested and measured on a machine with a GPU, with the Python that is there. Installs nothing.
#
#   tools/gpu.sh PYTHON OUT
#
# At most nine minutes: every start of Python has a limit, and all of them together come to less. A step that fails or
# runs out of time loses nothing of the others.
# Ends nonzero when something that was tried fails; what cannot be tried is said and does not count as passed.
set -uo pipefail

python=${1:?usage: tools/gpu.sh PYTHON OUT}
out=${2:?usage: tools/gpu.sh PYTHON OUT}
cd "$(dirname "$0")/.."
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=0

# within SECONDS COMMAND...: ends it after that time, by force a second later.
within() {
  timeout --kill-after=1 "$@"
}

# step NAME SECONDS COMMAND...: runs it with a limit; its output goes to the screen and to OUT/NAME.log.
step() {
  local name=$1 seconds=$2 status
  shift 2
  echo "== $name (at most $seconds s)"
  within "$seconds" "$@" 2>&1 | tee "$out/$name.log"
  status=${PIPESTATUS[0]}
  [ "$status" = 124 ] || [ "$status" = 137 ] && echo "== $name: stopped after $seconds s."
  return "$status"
}

if ! capability=$(within 40 "$python" - <<'PY'
import sys
import torch
if not torch.cuda.is_available():
    sys.exit(1)
device = torch.cuda.get_device_properties(0)
said = f"torch {torch.__version__}, CUDA {torch.version.cuda}, {device.name}, {device.total_memory / 2**30:.0f} GiB"
print(said, file=sys.stderr)
print(f"{device.major}.{device.minor}")
PY
); then
  echo "make gpu: torch in $python sees no CUDA device here, so there is nothing to do. Use \`make test\` on this machine."
  exit 1
fi

if within 10 "$python" -c 'import pybind11, setuptools' 2>/dev/null; then
  build=${HF_ACTNN_BUILD:-auto}
  # With a compiler at hand, kernels that do not build are a failure, not a slower run.
  if [ "$build" = auto ] && [ -x "${CUDA_HOME:+$CUDA_HOME/bin/nvcc}" -o -n "$(command -v nvcc)" ]; then
    build=cuda
  fi
  export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}
  step build 79 env HF_ACTNN_BUILD="$build" "$python" setup.py -q build_ext --inplace || failed=1
else
  echo "== build: left out, this Python has no pybind11 and setuptools."
fi
kernels=$(within 20 "$python" -c 'from hf_actnn.codec import native; print(native.cuda_status()["reason"] or "")') ||
  kernels="hf_actnn could not be imported"
if [ -n "$kernels" ]; then
  echo "CUDA kernels: none ($kernels). Tensors on the GPU are coded by the plain torch reference: right, but slow."
fi

if within 10 "$python" -c 'import pytest' 2>/dev/null; then
  # Most of a test's time is the host's.
  workers=$(within 5 "$python" -c 'import os, xdist; print("-n", min(4, os.cpu_count() or 1))' 2>/dev/null) || workers=
  # shellcheck disable=SC2086
  step test 70 "$python" -m pytest -m gpu -v tests --ignore tests/compiled -k "not compute_sanitizer" $workers || failed=1
  # Those that compile take the longest, a minute for what the others do in a second.
  # shellcheck disable=SC2086
  step compiled 60 "$python" -m pytest -m gpu -v tests/compiled $workers || failed=1
  step sanitizer 45 "$python" -m pytest -m gpu -q tests/cuda/test_gpu.py -k compute_sanitizer || failed=1
else
  echo "== test: left out, this Python has no pytest."
fi

if [ -n "$kernels" ]; then
  echo "== codec_gpu, step_gpu: left out, there are no CUDA kernels to measure."
else
  step codec_gpu 40 "$python" benchmarks/codec_gpu.py --device cuda --out "$out/codec_gpu.json" || failed=1
  if within 5 "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("timm") is None)'; then
    # The budget is counted from when the script begins, the limit from when Python starts.
    step step_gpu 140 "$python" benchmarks/step_gpu.py --device cuda --budget 128 --out "$out/step_gpu.json" || failed=1
  else
    echo "== step_gpu: left out, this Python has no timm."
  fi
fi
exit $failed
