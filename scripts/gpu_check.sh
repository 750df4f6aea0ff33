#!/usr/bin/env bash
# Everything worth doing on a machine with a GPU: build, compare the emulator with the GPU, test, sanitize, measure. No network, under
# ten minutes on a machine with 16 cores.
#
#   scripts/gpu_check.sh              all stages
#   scripts/gpu_check.sh build tests  only these; stages: build conformance kernels gpu tests routes bench sanitizer
#
# Needs on the machine: torch (2.10 or newer) in the Python called python3 (or $PYTHON), a C++ compiler, cmake, an NVRTC (see
# tools/nvrtc.py; torch for CUDA brings one along),
# setuptools >= 77, pytest, hypothesis, einops; pytest-xdist and compute-sanitizer if they are there. Code is built for the machine's own
# GPU, or for $ANYFLASH_CUDA_ARCHS.
#
# Results go to $OUT where that is set, else to benchmarks/results/<gpu>/. Commit that folder: summary.json, log.txt, bench.json and
# bench.txt (the measurements, also as a table), conformance.txt (what instructions return there; ctest compares the emulator with it).
# Three more have lines for the lists that `auto` goes by (docs/dispatch.md), in the place of what these say of the same GPU: measured.def
# and, where the stage routes passed, checked_routes.def for core/; where all others passed, checked.def for kernels/.
# Exit status: 0 all passed, 1 a stage failed, 2 wrong use, 3 no GPU (everything that a GPU would run was built).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

ALL="build conformance kernels gpu tests routes bench sanitizer"
STAGES="${*:-$ALL}"
for stage in $STAGES; do
  if [[ " $ALL " != *" $stage "* ]]; then
    echo "gpu_check: unknown stage '$stage'; stages: $ALL" >&2
    exit 2
  fi
done

HOST_PYTHON="${PYTHON:-python3}"
WORK="$PWD/build/gpu_check"
PYTHON="$WORK/venv/bin/python"
mkdir -p "$WORK"

# The GPU's name as a folder, its compute capability, and which of the architectures that ship it runs.
facts="$("$HOST_PYTHON" - <<'PY'
import re
try:
    import torch
except ImportError:
    raise SystemExit("gpu_check: this Python has no torch; set PYTHON to one that has")
if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability()
    sm = major * 10 + minor
    shipped = [arch for arch in (75, 80, 90, 100, 120) if arch // 10 == major and arch <= sm]
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    print(name, sm, max(shipped, default=sm))
PY
)" || exit 2
read -r GPU ARCH CODE <<< "$facts"
if [[ -n "$GPU" ]]; then
  export ANYFLASH_CUDA_ARCHS="${ANYFLASH_CUDA_ARCHS:-$CODE}"
  LIMIT=575  # seconds for all stages together
else
  LIMIT=3600 # a build for every GPU, maybe on few cores
fi
RESULTS="${OUT:-${GPU:+benchmarks/results/$GPU}}"
RESULTS="${RESULTS:-$WORK/results}"
mkdir -p "$RESULTS"
RESULTS="$(cd "$RESULTS" && pwd)"
: > "$RESULTS/log.txt"
: > "$WORK/stages"
export HOST_PYTHON PYTHON WORK RESULTS ARCH CODE PIP_NO_INDEX=1

# summarize: the stages so far. After every one, so that a run which is ended early leaves it too.
summarize() {
  "$HOST_PYTHON" - "$WORK/stages" "$RESULTS/summary.json" "$PYTHON" tools/nvrtc.py find build/nvrtc "${CODE:-90}" <<'PY'
import json, platform, subprocess, sys

def said(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""

stages = [line.split() for line in open(sys.argv[1])]
query = "name,compute_cap,driver_version,clocks.max.sm,power.limit"
summary = {
    "gpu": said("nvidia-smi", "--query-gpu=" + query, "--format=csv,noheader"),
    "nvrtc": said(*sys.argv[3:]),
    "python": platform.python_version(),
    "commit": said("git", "rev-parse", "HEAD"),
    "changed": len(said("git", "status", "--porcelain", "--untracked-files=no").splitlines()),
    "stages": {name: {"status": int(status), "seconds": int(seconds)} for name, status, seconds in stages},
}
with open(sys.argv[2], "w") as file:
    file.write(json.dumps(summary, indent=1) + "\n")
PY
}

# stage <name> <seconds at most>: runs the function of that name; its output goes to the log, its last lines to the screen.
stage() {
  local name="$1" limit="$2" began=$SECONDS status first
  [[ " $STAGES " == *" $name "* ]] || return 0
  limit=$((limit < LIMIT - SECONDS ? limit : LIMIT - SECONDS))
  echo "== $name (at most $limit s)" | tee -a "$RESULTS/log.txt"
  first=$(wc -l < "$RESULTS/log.txt")
  if ((limit > 0)); then
    export -f "$name"
    timeout --kill-after=5 "$limit" bash -uo pipefail -c "$name" >> "$RESULTS/log.txt" 2>&1
    status=$?
  else
    status=124 # no time left
  fi
  tail -n "+$((first + 1))" "$RESULTS/log.txt" | tail -n 12 | cut -c -200
  echo "== $name: status $status, $((SECONDS - began)) s" | tee -a "$RESULTS/log.txt"
  echo "$name $status $((SECONDS - began))" >> "$WORK/stages"
  summarize
  return $status
}

# An environment of its own that sees the machine's packages, so that anyflash is installed as a user installs it, start-up hook included.
# Beside it the programs of the stages conformance and kernels.
build() {
  "$HOST_PYTHON" -m venv --clear --without-pip "$WORK/venv" || return
  local purelib='import sysconfig; print(sysconfig.get_paths()["purelib"])'
  "$HOST_PYTHON" -c "$purelib" > "$("$PYTHON" -c "$purelib")/machine.pth" || return
  ANYFLASH_BUILD=1 ANYFLASH_CUDA=1 "$PYTHON" -m pip install -v --no-index --no-build-isolation --no-deps . || return
  "$PYTHON" -m anyflash info
  "$PYTHON" -c 'import anyflash._loader as l; print(*l.reasons); assert l.provider == "binary", l.provider' || return
  local library
  library="$("$PYTHON" -c 'import anyflash, pathlib; print(pathlib.Path(anyflash.__file__).parent)')"
  "${CXX:-c++}" -std=c++17 -O1 -I. tests/gpu/attention_on_device.cpp -o "$WORK/attention_on_device" \
    -L"$library" -lanyflash_kernels -ldl "-Wl,-rpath,$library" || return
  "${CXX:-c++}" -std=c++17 -O1 -I. emulator/tests/conf.cpp -o "$WORK/conformance" -ldl || return
  local arch="${CODE:-90}" compiler
  ((arch >= 80)) || return 0 # the instructions are those of sm_80 and newer
  [[ "$arch" != 90 ]] || arch=90a # wgmma and TMA
  compiler="$("$PYTHON" tools/nvrtc.py find build/nvrtc "$arch")" || return
  "$PYTHON" tools/nvrtc.py compile "${compiler##* }" "sm_$arch" emulator/tests/conf_kernels.cu "$WORK/conformance.cubin" -I.
}

# What single instructions return, for the emulator to be compared with.
conformance() { "$WORK/conformance" write "$RESULTS/conformance.txt" "$WORK/conformance.cubin"; }

# Every attention kernel on the emulator's problems. Most of the time goes into the reference, on one core per process.
kernels() {
  local lines=({forward,backward}_fp16_d{64,128,256}_sm75)
  ((ARCH < 80)) || lines=({forward,backward}_{fp16,bf16}_d{64,96,128,192,256}_sm80)
  printf '%s\n' "${lines[@]}" | xargs -P "$(nproc)" -I {} "$WORK/attention_on_device" --instance {}
}

# What only a GPU can show: graphs, streams, large tensors.
gpu() { "$PYTHON" -m pytest -q tests/gpu -p no:cacheprovider -k "not aten_cudnn"; }

tests() {
  "$PYTHON" -m anyflash doctor
  local parallel=()
  "$PYTHON" -c 'import xdist' 2> /dev/null && parallel=(-n 8)
  "$PYTHON" -m pytest -q tests/python --device cuda "${parallel[@]}" --durations=10 -p no:cacheprovider -k "not aten_cudnn"
}

# What waits in core/checked_routes.def, apart from the rest: neither keeps the other from being chosen.
routes() {
  "$PYTHON" -m pytest -q tests/gpu -p no:cacheprovider -k aten_cudnn || return
  "$PYTHON" -m pytest -q tests/python/test_forward.py tests/python/test_backward.py --device cuda -p no:cacheprovider -k aten_cudnn || return
  "$PYTHON" scripts/checked.py routes "$ARCH" > "$RESULTS/checked_routes.def"
}

bench() { "$PYTHON" -m benchmarks.gpu --out "$RESULTS"; }

sanitizer() {
  local tool status=0
  for tool in memcheck racecheck synccheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$WORK/attention_on_device" --instance "fp16_d128_sm$((ARCH < 80 ? 75 : 80))" --every 4 --runs 1 || status=1
  done
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # an allocation per tensor, so that a step beyond one is seen
  compute-sanitizer --tool memcheck --error-exitcode 9 \
    "$PYTHON" -m pytest -q tests/gpu/test_bias_activation_kernel.py -p no:cacheprovider \
    -k '(gelu_tanh or silu_gate) and (7x130 or 5x4098) or stride' || status=1
  return $status
}

failed=0 routes=0
stage build $([[ -n "$GPU" ]] && echo 200 || echo 3600) || failed=1
if [[ -z "$GPU" ]]; then
  echo "gpu_check: no GPU that torch can use: nothing was run. $([[ $failed == 0 ]] && echo 'The build stage passed.')" >&2
  exit $((failed ? 1 : 3))
fi
if [[ ! -x "$WORK/attention_on_device" ]]; then
  echo "gpu_check: nothing is built; run the build stage first" >&2
  exit 1
fi
((ARCH < 80)) || stage conformance 30 || failed=1
stage kernels 60 || failed=1
stage gpu 60 || failed=1
stage tests 120 || failed=1
stage routes 60 || routes=1
stage bench 180 || failed=1
stage sanitizer 60 || failed=1
[[ $failed == 1 || "$STAGES" != "$ALL" ]] || "$PYTHON" scripts/checked.py kernels "$ARCH" > "$RESULTS/checked.def"
echo "results: $RESULTS"
exit $((failed | routes))
