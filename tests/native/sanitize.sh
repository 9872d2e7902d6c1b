#!/usr/bin/env bash
# The native module under GCC's sanitizers; make sanitize runs it.
#
#   PYTHON=python3 tests/native/sanitize.sh [address] [thread]
#
# address: AddressSanitizer and UndefinedBehaviorSanitizer, also of the GPU's kernels on the CPU, and
# on every instruction set that the processor has. thread: ThreadSanitizer. Each is built in
# build/sanitize-*, must report the faults of faults.cpp, and then nothing while the tests run. What
# a sanitizer reports is printed, and in build/sanitize-*/report.*.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(realpath -s "$(command -v "${PYTHON:-python3}")")
export PATH=${python%/*}:$PATH
export FUSEDOPT_BACKEND=native FUSEDOPT_REQUIRE_NATIVE=1 PYTHONUNBUFFERED=1
tests=$PWD/tests

step() { printf '\n== %s\n' "$*"; }
fail() {
  for report in "$dir"/report.*; do [[ ! -e $report ]] || head -n 60 "$report" >&2; done
  echo "FAILED: $*" >&2
  exit 1
}

# build DIR KERNELS_ON_HOST
build() {
  step "build $1"
  cmake -S csrc -B "$1" -G Ninja -DPython_EXECUTABLE="$python" -DFUSEDOPT_KERNELS_ON_HOST="$2" \
    -DFUSEDOPT_SANITIZE="$kind" -DCMAKE_BUILD_TYPE=Debug >/dev/null
  nice ninja -C "$1" --quiet
}

# Runs a command beside a copy of the package that has this module, with the sanitizer loaded before
# the interpreter. The interpreter does not free all when it ends, so leaks are not looked for.
sanitized() {
  local preload="" library options=log_path=$dir/report
  for library in "${libraries[@]}"; do preload+=" $(gcc -print-file-name="$library")"; done
  rm -rf "$dir"/{site,report.*} && mkdir -p "$dir/site/fusedopt"
  cp fusedopt/*.py "$dir"/_native*.so "$dir/site/fusedopt"
  (cd "$dir/site" &&
    ASAN_OPTIONS=detect_leaks=0:$options UBSAN_OPTIONS=print_stacktrace=1:$options \
    TSAN_OPTIONS=halt_on_error=1:suppressions=$tests/native/tsan.supp:$options \
    OMP_NUM_THREADS=1 LD_PRELOAD=$preload nice "$@")
}

# fault FUNCTION REPORT: a function of faults.cpp, and what must be said of it.
fault() {
  sanitized "$python" -c '
import ctypes, sys, torch
function = getattr(ctypes.CDLL(sys.argv[1]), sys.argv[2])
param = torch.zeros(1 << 20)
function(ctypes.c_void_p(param.data_ptr()), ctypes.c_int64(param.numel()), 2)
print("nothing to report")' "$dir/libfaults.so" "$1" >"$dir/output" 2>&1 || true
  cat "$dir"/report.* 2>/dev/null >>"$dir/output" || true
  grep -qF "$2" "$dir/output" || fail "$1() in faults.cpp must be reported as '$2'"
  echo "$1: $2, as it should be"
}

# run PYTEST_ARGUMENTS...
run() {
  local code=0
  sanitized "$python" -m pytest -q -p no:cacheprovider "$@" || code=$?
  ! compgen -G "$dir/report.*" >/dev/null || fail "reported by the sanitizer, see above"
  ((code == 0)) || fail "pytest ended with exit code $code"
}

address() {
  libraries=(libasan.so libubsan.so)
  build "$dir" OFF
  build "$dir/on_host" ON
  export FUSEDOPT_ON_HOST=$dir/on_host
  step "faults"
  fault right "nothing to report"
  fault too_far "heap-buffer-overflow"
  fault in_32_bits "signed integer overflow"
  step "tests on the widest instruction set"
  run "$tests"/test_{native,errors,shared_steps,torch_layout,subnormals}.py \
    "$tests"/{layouts,scaling,memory,ownership,overlaps,containers} \
    -k "native and not python and not quick and not instruction_set"
  run "$tests"/test_kernels.py "$tests"/storage -k "not python and not beyond_32 and not instruction_set"
  local isa
  for isa in avx2 baseline; do
    step "tests on $isa"
    FUSEDOPT_CPU_ISA=$isa run "$tests"/{layouts,scaling,storage} -k "native and \
      (every_count or rule_on_numbers or codes or clipping_is_that_of_torch)"
  done
}

thread() {
  libraries=(libtsan.so)
  build "$dir" OFF
  step "faults"
  fault right "nothing to report"
  fault too_far "data race"
  step "tests with several threads"
  run "$tests"/test_{native,same_bits}.py "$tests"/scaling -k "(one_process and AdamW and amsgrad) or \
    several_threads or lock_is_released or large_and_many or any_number_of_threads"
}

(($#)) || set -- address thread
for kind in "$@"; do
  dir=$PWD/build/sanitize-$kind
  mkdir -p "$dir"
  "$kind"
done
