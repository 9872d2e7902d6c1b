#!/usr/bin/env bash
# Everything that only a GPU can prove, in one command of at most nine minutes, without a network:
#
#   bench/gpu_check.sh OUT_DIR
#
# Builds the native module, which needs nothing of CUDA; compiles every kernel for the GPU at hand and
# tries it out there; then come the tests, the step benchmark, and compute-sanitizer over the trials
# and some of the tests. OUT_DIR receives check.log (all that was printed), self_test.txt (each kernel's
# seconds and verdict), step.json, step_clip.json, offload.json and the figures. Without a build nothing
# else runs; any other step that fails or takes too long does not stop those after it. The exit code says whether
# all went well. No setting of the GPU is changed.
#
#   PYTHON   the interpreter that has torch (python3)
#   WHEELS   a folder of wheels of packages that PYTHON lacks; they are not installed into it
#   COMMIT   what is being checked, where git cannot tell
#   DRY_RUN  1: on the CPU and small, to check this script; nothing of CUDA is proven
set -uo pipefail

# Seconds. A limit stops what hangs; should many come near theirs, TOTAL cuts what comes last.
TOTAL=530
BUILD=150
INFO=20
SELF_TEST=120
GPU_TESTS=120
STEP_BENCH=130
CLIP_BENCH=40
STORAGE_BENCH=40
OFFLOAD_BENCH=120
SANITIZER=60 # each of three
OTHER_TESTS=60
STEP_BUDGET=0.5 # per cell of the benchmark
CLIP_BUDGET=1

if (($# != 1)); then
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2
  exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
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

skip() { record "$1" "skipped: $2" 0; }

# step NAME LIMIT COMMAND...: what it prints goes to the log, and its end to the screen if it fails.
step() {
  local name=$1 limit=$(($2 * patience)) begin=$SECONDS code
  shift 2
  ((limit <= TOTAL - SECONDS)) || limit=$((TOTAL - SECONDS))
  printf '\n===== %s: %s\n' "$name" "$*" >>"$log"
  if ((limit < 3)); then
    failures=$((failures + 1))
    record "$name" "FAILED: no time left" 0
    return 1
  fi
  timeout --signal=INT --kill-after=10 "$limit" "$@" </dev/null 2>&1 |
    tee "$scratch/last" >>"$log"
  code=${PIPESTATUS[0]}
  if ((code == 0)); then
    record "$name" ok $((SECONDS - begin))
    return 0
  fi
  failures=$((failures + 1))
  tail -n 40 "$scratch/last" | cut -c -200
  case $code in
    124 | 137) record "$name" "FAILED: over $limit s" $((SECONDS - begin)) ;;
    *) record "$name" "FAILED: exit code $code" $((SECONDS - begin)) ;;
  esac
  return 1
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
  "$python" -m pip list 2>/dev/null | grep -iE \
    '^(cmake|hypothesis|matplotlib|ninja|numpy|pybind11|pytest|rich|setuptools|torch|triton)'
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
step info $INFO env FUSEDOPT_BACKEND=native "$python" -m fusedopt.info

# --- every kernel, on this GPU -----------------------------------------------------------------
if [[ $dry == 1 ]]; then
  skip self-test "needs a GPU"
else
  step self-test $SELF_TEST "$python" -m fusedopt.self_test && tail -n 2 "$scratch/last"
  cp "$scratch/last" "$out/self_test.txt"
fi

# --- tests on the GPU --------------------------------------------------------------------------
pytest=("$python" -m pytest -q -p no:cacheprovider)
step gpu-tests $GPU_TESTS "${pytest[@]}" --maxfail=10 --durations=10 tests/on_gpu

# --- figures -----------------------------------------------------------------------------------
if [[ $dry == 1 ]]; then
  STEP_BUDGET=0.05
  CLIP_BUDGET=0.05
  workloads=(many_small mlp_100x10k)
  clip_workloads=(mlp_100x10k)
else
  # The most important first, should the time not suffice: what was measured by then is written.
  workloads=(gpt2_124m small_10k groups_465 lora_2048 one_large many_small resnet50 llama_1b)
  clip_workloads=(gpt2_124m lora_2048)
fi
bench=(env FUSEDOPT_BACKEND=native "$python" -m bench.step --device "$device" --modes foreach fused)
if step bench $STEP_BENCH "${bench[@]}" --budget $STEP_BUDGET --out "$out" \
  --workloads "${workloads[@]}"; then
  cat "$scratch/last"
elif [[ -e $out/step.json && ! -e $out/step_speedup.png ]]; then
  step figures 20 "$python" -m bench.step_plots "$out/step.json"
fi

if step clip-bench $CLIP_BENCH "${bench[@]}" --clip --budget $CLIP_BUDGET \
  --workloads "${clip_workloads[@]}" --dtypes fp32 --out "$scratch/clip"; then
  cat "$scratch/last"
fi
cp "$scratch"/clip/*.json "$out" 2>/dev/null # its figures can be drawn from it

if step storage-bench $STORAGE_BENCH env FUSEDOPT_BACKEND=native "$python" -m bench.storage \
  --device "$device" --budget $STEP_BUDGET --workloads "${clip_workloads[0]}" --out "$out"; then
  cat "$scratch/last"
fi

if [[ $dry == 1 ]]; then offload=(--numel 1000000 --rounds 2 --steps 4); else offload=(--threads 16); fi
if step offload-bench $OFFLOAD_BENCH env FUSEDOPT_BACKEND=native "$python" -m bench.offload \
  --device "$device" "${offload[@]}" --out "$out"; then
  cat "$scratch/last"
fi

# --- memory checkers -------------------------------------------------------------------------
# Without torch's own pool of memory, an access beyond a tensor is one beyond an allocation. A race is
# looked for in what every kernel does when it is tried out.
small=("${pytest[@]}" -x -k sanitize tests/on_gpu)
sanitize() { # TOOL COMMAND...
  local tool=$1
  shift
  if [[ $dry == 1 ]]; then
    skip "$tool" "needs a GPU"
  elif ! command -v compute-sanitizer >/dev/null; then
    failures=$((failures + 1))
    record "$tool" "FAILED: no compute-sanitizer" 0
  else
    step "$tool" $SANITIZER env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --tool "$tool" --error-exitcode 99 --target-processes all "$@"
  fi
}
sanitize memcheck --report-api-errors no "${small[@]}"
sanitize racecheck "$python" -m fusedopt.self_test
sanitize initcheck "${small[@]}"

# --- everything else ---------------------------------------------------------------------------
# But for what runs the kernels on the CPU, several processes or other packages: no GPU needed.
others=()
for file in tests/test_*.py tests/*/test_*.py; do
  if [[ $file =~ ^tests/(on_gpu|device|compiled_kernels|distributed|interop)/ ]] ||
    [[ $file =~ /test_(kernels|machine_code|ptx)\.py$ ]]; then
    continue
  elif grep -qE '^(from|import) hypothesis' "$file" && ! has hypothesis; then
    skip "$(basename "$file")" "no hypothesis"
  elif [[ $dry != 1 || $file == */test_torch_table.py ]]; then
    others+=("$file")
  fi
done
parallel=()
if has xdist; then parallel=(-n 8); fi
step other-tests $OTHER_TESTS "${pytest[@]}" "${parallel[@]}" --maxfail=10 -k "not kernels" "${others[@]}"

finish
