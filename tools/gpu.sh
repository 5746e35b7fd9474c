#!/usr/bin/env bash
# What can be built, tested and measured on a machine with a GPU, with the Python that is there. Installs nothing.
#
#   tools/gpu.sh PYTHON OUT
#
# Ends nonzero when something that was tried fails; what cannot be tried is said and does not count as passed.
set -uo pipefail

python=${1:?usage: tools/gpu.sh PYTHON OUT}
out=${2:?usage: tools/gpu.sh PYTHON OUT}
cd "$(dirname "$0")/.."
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=0

if ! "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
  echo "make gpu: torch in $python sees no CUDA device here, so there is nothing to do. Use \`make test\` on this machine."
  exit 1
fi
"$python" - <<'PY'
import torch
device = torch.cuda.get_device_properties(0)
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {device.name}, {device.total_memory / 2**30:.0f} GiB")
PY

kernels=$(ls csrc/cuda/*.cu 2>/dev/null)
if [ -z "$kernels" ]; then
  echo "CUDA kernels: none in this version. Tensors on the GPU are coded by the plain torch reference: right, but slow;"
  echo "  times measured here say nothing about the speed this package is meant to have on a GPU."
fi

if "$python" -c 'import pybind11, setuptools' 2>/dev/null; then
  echo "== build in place (HF_ACTNN_BUILD=${HF_ACTNN_BUILD:-auto})"
  "$python" setup.py -q build_ext --inplace 2>&1 | tee "$out/build.log" || failed=1
else
  echo "== build: left out, this Python has no pybind11 and setuptools. The reference codec serves."
fi

if "$python" -c 'import pytest' 2>/dev/null; then
  echo "== tests marked gpu"
  "$python" -m pytest -m gpu -q tests 2>&1 | tee "$out/test.log"
  status=${PIPESTATUS[0]}
  if [ "$status" = 5 ]; then
    echo "   no test is marked gpu in this version: nothing about the GPU was tested."
  elif [ "$status" != 0 ]; then
    failed=1
  fi
else
  echo "== tests: left out, this Python has no pytest."
fi

if [ -z "$kernels" ]; then
  echo "== benchmarks: left out, there are no CUDA kernels to measure."
else
  for file in benchmarks/*.py; do
    grep -q '"--device"' "$file" || continue
    name=$(basename "$file" .py)
    echo "== $file"
    "$python" "$file" --device cuda --out "$out/$name.json" 2>&1 | tee "$out/$name.log" || failed=1
  done
fi
exit $failed
