#!/usr/bin/env bash
# Everything that only a GPU can prove, in one command of at most eight minutes, without a network:
#
#   bench/gpu_check.sh OUT_DIR           # all
#   bench/gpu_check.sh OUT_DIR STEP...   # the build, and of the steps below only these
#
# Builds the native module, which needs nothing of CUDA; then, the most telling first:
#
#   info           what runs on this machine
#   self-test      compiles every kernel for the GPU at hand and tries it out there
#   gpu-tests      tests/on_gpu
#   bench          times of a step
#   memcheck       compute-sanitizer, over some of the tests
#   racecheck      the same, over what the self-test does
#   clip-bench     times of clipping and step
#   storage-bench  times of a step for each way of storing
#   initcheck      as memcheck
#   offload-bench  the optimizer on the host
#
# OUT_DIR receives check.log (all that was printed) and the figures as JSON, each of which is written as
# soon as it is there; `python -m bench.step_plots OUT_DIR/step.json` draws them. Without a build
# nothing else runs; any other step that fails or takes too long does not stop those after it. The exit
# code says whether all went well. No setting of the GPU is changed.
#
#   PYTHON   the interpreter that has torch (python3)
#   TOTAL    seconds for all of it (480)
#   WHEELS   a folder of wheels of packages that PYTHON lacks; they are not installed into it
#   COMMIT   what is being checked, where git cannot tell
#   DRY_RUN  1: on the CPU and small, to check this script; nothing of CUDA is proven
set -uo pipefail

# Seconds. A limit stops what hangs. Up to racecheck they and the first look at the machine add up to
# TOTAL: of these steps none is cut by those before it. What comes after them has what they leave.
TOTAL=${TOTAL:-480}
BUILD=90
INFO=30
SELF_TEST=60
GPU_TESTS=90
STEP_BENCH=80
SANITIZER=60 # each of three
CLIP_BENCH=30
STORAGE_BENCH=40
OFFLOAD_BENCH=120
STEP_BUDGET=0.5 # for each line of a table

STEPS=(info self-test gpu-tests bench memcheck racecheck clip-bench storage-bench initcheck
  offload-bench)

usage() {
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2
  exit 2
}

(($# >= 1)) || usage
for name in "${@:2}"; do
  [[ " ${STEPS[*]} " == *" $name "* ]] || { echo "gpu_check: there is no step '$name'" >&2 && usage; }
done
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
wanted=" build ${*:2} "
(($# > 1)) || wanted=" build ${STEPS[*]} "
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

dry=${DRY_RUN:-0}
patience=1
python=${PYTHON:-python3}
log=$out/check.log
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
summary=()
failures=0

export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export FUSEDOPT_REQUIRE_NATIVE=1 # a test without the native module fails instead of skipping
export FUSEDOPT_CACHE_DIR=$scratch/cache # no kernel of an earlier run, and each is compiled once
export FUSEDOPT_TEST_SEED=${FUSEDOPT_TEST_SEED:-$RANDOM} # one for all processes of pytest
export COMMIT=${COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
: >"$log"

# record NAME RESULT SECONDS
record() {
  summary+=("$(printf '%-14s %4d s  %s' "$1" "$3" "$2")")
  printf '== %s: %s, %d s\n' "$1" "$2" "$3" | tee -a "$log"
}

is_wanted() { [[ $wanted == *" $1 "* ]]; }

skip() { is_wanted "$1" && record "$1" "skipped: $2" 0; }

fail() {
  failures=$((failures + 1))
  record "$1" "FAILED: $2" "$3"
}

# The seconds that a step with this limit has.
seconds_for() {
  local limit=$(($1 * patience)) left=$((TOTAL - SECONDS))
  echo $((limit < left ? limit : left))
}

# step NAME LIMIT COMMAND...: what it prints goes to the log, and its end to the screen if it fails.
step() {
  local name=$1 limit begin=$SECONDS code
  is_wanted "$name" || return 1
  limit=$(seconds_for "$2")
  shift 2
  printf '\n===== %s: %s\n' "$name" "$*" >>"$log"
  if ((limit < 3)); then
    fail "$name" "no time left" 0
    return 1
  fi
  # No pipe, which would be open for as long as a child of the command lives that does not end; what
  # is left of its group is killed, for it would keep the GPU.
  set -m
  timeout --signal=INT --kill-after=10 "$limit" "$@" </dev/null >"$scratch/last" 2>&1 &
  wait $!
  code=$?
  kill -KILL -- -$! 2>/dev/null
  set +m
  cat "$scratch/last" >>"$log"
  if ((code == 0)); then
    record "$name" ok $((SECONDS - begin))
    return 0
  fi
  tail -n 40 "$scratch/last" | cut -c -200
  case $code in
    124 | 137) fail "$name" "over $limit s" $((SECONDS - begin)) ;;
    *) fail "$name" "exit code $code" $((SECONDS - begin)) ;;
  esac
  return 1
}

# bench NAME LIMIT LAST MODULE ARGUMENTS...: shows the tables. It begins nothing when only LAST seconds
# are left, and so ends by itself.
bench() {
  local name=$1 limit=$2 last=$3 module=$4 seconds
  shift 4
  seconds=$(($(seconds_for "$limit") - last))
  if ((seconds <= 0)); then
    is_wanted "$name" && fail "$name" "no time left" 0
    return 1
  fi
  step "$name" "$limit" env FUSEDOPT_BACKEND=native "$python" -m "bench.$module" --device "$device" \
    --out "$out" --seconds $seconds "$@" && cat "$scratch/last"
}

finish() {
  {
    printf '\n%s, %d s\n' "$COMMIT" "$SECONDS"
    printf '  %s\n' "${summary[@]}"
    if ((failures == 0)); then echo "all passed"; else echo "$failures FAILED"; fi
  } | tee -a "$log"
  exit $((failures > 0))
}

has() { "$python" -c "import $1" 2>/dev/null; }

facts() {
  echo "commit $COMMIT, FUSEDOPT_TEST_SEED=$FUSEDOPT_TEST_SEED"
  uname -srm
  "$python" --version
  for tool in gcc cmake ninja compute-sanitizer; do
    echo "$tool: $(command -v "$tool" || echo missing)"
  done
  gcc --version | head -n 1
  "$python" - <<'PYTHON'
from importlib import metadata

for name in "torch triton numpy pytest pytest-xdist matplotlib rich setuptools pybind11".split():
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "missing")
PYTHON
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi -L
    nvidia-smi -q -d MEMORY,CLOCK,POWER,PERFORMANCE,ECC,COMPUTE
  fi
}

# --- what is here ------------------------------------------------------------------------------
if [[ -n ${WHEELS:-} ]]; then
  if "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
    --target "$scratch/site" "$WHEELS"/*.whl >>"$log" 2>&1; then
    PYTHONPATH=$scratch/site:$PYTHONPATH
  else
    echo "gpu_check: the wheels in $WHEELS cannot be installed, see $log" >&2
  fi
fi
# The first import of torch reads gigabytes from the disk: beside the build.
timeout $BUILD "$python" -c 'import torch; torch.cuda.is_available()' </dev/null >/dev/null 2>&1 &
first_import=$!
facts >>"$log" 2>&1

if [[ $dry == 1 ]]; then
  device=cpu
  TOTAL=3600 patience=10 # on a slow or busy machine: the time is not what is checked
else
  device=cuda
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
  [[ $capability =~ ^[0-9]+\.[0-9]+$ ]] || capability=$("$python" -c \
    'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))' 2>>"$log")
  if [[ -z $capability ]]; then
    echo "gpu_check: no GPU; DRY_RUN=1 checks this script without one" | tee -a "$log" >&2
    exit 2
  fi
fi
echo "gpu_check of $COMMIT on ${capability:-no GPU}, log in $log"

# --- build -------------------------------------------------------------------------------------
# In place, into no environment: that works with any Python, and nothing has to be undone.
step build $BUILD "$python" setup.py build_ext --inplace || finish
wait $first_import
step info $INFO env FUSEDOPT_BACKEND=native "$python" -m fusedopt.info

# --- every kernel, on this GPU -----------------------------------------------------------------
if [[ $dry == 1 ]]; then
  skip self-test "needs a GPU"
else
  step self-test $SELF_TEST "$python" -m fusedopt.self_test && tail -n 2 "$scratch/last"
fi

# --- tests on the GPU --------------------------------------------------------------------------
# In several processes, if pytest can: an error that ends one of them leaves the others.
pytest=("$python" -m pytest -q -p no:cacheprovider)
parallel=()
if has xdist; then parallel=(-n 4); fi
step gpu-tests $GPU_TESTS "${pytest[@]}" "${parallel[@]}" --maxfail=40 --tb=short --durations=10 \
  tests/on_gpu

# --- figures -----------------------------------------------------------------------------------
if [[ $dry == 1 ]]; then
  STEP_BUDGET=0.05
  few=(--workloads many_small mlp_100x10k)
  clip=(--workloads mlp_100x10k)
  storage=(--workloads mlp_100x10k)
  offload=(--numel 1000000 --rounds 2 --steps 4)
else
  few=()
  clip=(--workloads gpt2_124m lora_2048)
  storage=()
  offload=()
fi
figures=(--brief --no-plots --modes foreach fused --budget "$STEP_BUDGET")
bench bench $STEP_BENCH 15 step "${figures[@]}" "${few[@]}"

# --- memory checkers -------------------------------------------------------------------------
# Without torch's own pool of memory, an access beyond a tensor is one beyond an allocation. A race is
# looked for in what every kernel does when it is tried out. Torch's kernels, which would take most of
# the time, are left out, but where it counts what they have written.
ours=(--kernel-name kns=fusedopt_)
small=("${pytest[@]}" -x -k sanitize tests/on_gpu/test_sanitized.py)
sanitize() { # TOOL COMMAND...
  local tool=$1
  shift
  if [[ $dry == 1 ]]; then
    skip "$tool" "needs a GPU"
  elif is_wanted "$tool" && ! command -v compute-sanitizer >/dev/null; then
    fail "$tool" "no compute-sanitizer" 0
  else
    step "$tool" $SANITIZER env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --tool "$tool" --error-exitcode 99 --target-processes all "$@"
  fi
}
sanitize memcheck "${ours[@]}" --report-api-errors no "${small[@]}"
sanitize racecheck "${ours[@]}" "$python" -m fusedopt.self_test

# --- as far as there is time -------------------------------------------------------------------
bench clip-bench $CLIP_BENCH 15 step --clip "${figures[@]}" "${clip[@]}" --dtypes fp32
bench storage-bench $STORAGE_BENCH 15 storage --budget $STEP_BUDGET "${storage[@]}"
sanitize initcheck "${small[@]}"
bench offload-bench $OFFLOAD_BENCH 30 offload "${offload[@]}"

finish
