#!/usr/bin/env bash
# Everything worth doing on a machine with a GPU: build, test, sanitize, measure. No network, under ten minutes.
#
#   scripts/gpu_check.sh              all stages
#   scripts/gpu_check.sh build tests  only these; stages: build tests gpu sanitizer bench
#
# Needs on the machine: torch (2.10 or newer), nvcc, a C++ compiler, cmake, pybind11, setuptools >= 77, pytest, hypothesis, einops.
# Results go to $OUT where that is set, else to benchmarks/results/<gpu>/: summary.json and a log per stage. Commit that folder.
# Exit status: 0 all passed, 1 a stage failed, 2 wrong use, 3 no GPU (the build still ran).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

ALL="build tests gpu sanitizer bench"
STAGES="${*:-$ALL}"
for stage in $STAGES; do
  if [[ " $ALL " != *" $stage "* ]]; then
    echo "gpu_check: unknown stage '$stage'; stages: $ALL" >&2
    exit 2
  fi
done

HOST_PYTHON="${PYTHON:-python3}"
WORK="build/gpu_check"
PYTHON="$PWD/$WORK/venv/bin/python"
mkdir -p "$WORK"

facts="$("$HOST_PYTHON" - <<'PY'
import re
try:
    import torch
except ImportError:
    raise SystemExit("gpu_check: this Python has no torch; set PYTHON to one that has")
name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
print(re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))
PY
)" || exit 2
GPU="$facts"
RESULTS="${OUT:-$([[ -n "$GPU" ]] && echo "benchmarks/results/$GPU" || echo "$WORK")}"
mkdir -p "$RESULTS"
RESULTS="$(cd "$RESULTS" && pwd)"
: > "$WORK/summary"

# record <stage> <status> <seconds>
record() { echo "$1 $2 $3" >> "$WORK/summary"; }

# stage <name> <seconds at most> <function>: its output goes to a log, its last lines to the screen
stage() {
  local name="$1" limit="$2" action="$3" began=$SECONDS status
  [[ " $STAGES " == *" $name "* ]] || return 0
  echo "== $name (at most $limit s)"
  export -f "$action"
  timeout --kill-after=10 "$limit" bash -uo pipefail -c "$action" > "$RESULTS/$name.log" 2>&1
  status=$?
  tail -n 12 "$RESULTS/$name.log" | cut -c -200
  echo "== $name: status $status, $((SECONDS - began)) s"
  record "$name" "$status" "$((SECONDS - began))"
  return $status
}

# An environment of its own that sees the machine's packages, so that anyflash is installed as a user installs it, start-up hook included.
build() {
  "$HOST_PYTHON" -m venv --clear --without-pip "$WORK/venv" || return
  local purelib='import sysconfig; print(sysconfig.get_paths()["purelib"])'
  "$HOST_PYTHON" -c "$purelib" > "$("$PYTHON" -c "$purelib")/machine.pth" || return
  nvcc --version
  ANYFLASH_BUILD=1 ANYFLASH_CUDA=1 "$PYTHON" -m pip install -v --no-index --no-build-isolation --no-deps . || return
  "$PYTHON" -m anyflash info
  "$PYTHON" -c 'import anyflash._loader as l; print(*l.reasons); assert l.provider == "binary", l.provider'
}

tests() {
  "$PYTHON" -m anyflash doctor
  local parallel=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n 6)
  "$PYTHON" -m pytest -q tests/python --device cuda "${parallel[@]}" --durations=10 -p no:cacheprovider
}

gpu() { "$PYTHON" -m pytest -q tests/gpu -p no:cacheprovider; }

sanitizer() {
  local tool status=0
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # an allocation per tensor, so that a step beyond one is seen
  for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$PYTHON" -m pytest -q tests/gpu/test_bias_activation_kernel.py -p no:cacheprovider \
      -k '(gelu_tanh or silu_gate) and (7x130 or 5x4098) or stride' || status=1
  done
  return $status
}

bench() { "$PYTHON" -m benchmarks.gpu --out "$RESULTS"; }

export HOST_PYTHON PYTHON WORK RESULTS
failed=0
stage build "$([[ -n "$GPU" ]] && echo 150 || echo 900)" build || failed=1
if [[ -z "$GPU" ]]; then
  echo "gpu_check: no GPU that torch can use: nothing was run. $([[ $failed == 0 ]] && echo 'The build stage passed.')" >&2
  exit $((failed ? 1 : 3))
fi
if [[ ! -x "$PYTHON" ]]; then
  echo "gpu_check: nothing is built; run the build stage first" >&2
  exit 1
fi
stage gpu 60 gpu || failed=1
stage tests 180 tests || failed=1
stage bench 60 bench || failed=1
stage sanitizer 90 sanitizer || failed=1

"$HOST_PYTHON" - "$WORK/summary" "$RESULTS/summary.json" <<'PY'
import json, platform, subprocess, sys
import torch

stages = [line.split() for line in open(sys.argv[1])]
driver = subprocess.run(
    ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
).stdout.strip()
commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
summary = {
    "gpu": torch.cuda.get_device_name(),
    "capability": list(torch.cuda.get_device_capability()),
    "driver": driver,
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "python": platform.python_version(),
    "commit": commit,
    "stages": {name: {"status": int(status), "seconds": int(seconds)} for name, status, seconds in stages},
}
with open(sys.argv[2], "w") as file:
    json.dump(summary, file, indent=2)
    file.write("\n")
print(json.dumps(summary["stages"], indent=2))
PY
echo "results: $RESULTS"
exit $failed
