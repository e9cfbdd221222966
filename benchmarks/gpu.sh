#!/usr/bin/env bash
# Builds the CUDA kernels on a machine with a GPU, runs every test that needs one, then measures.
#
#     benchmarks/gpu.sh                 # results in ./gpu-results, or in $OUT where that is set
#     PYTHON=python3.12 benchmarks/gpu.sh
#     LIMIT=400 benchmarks/gpu.sh       # in so many seconds; the benchmark takes what is left
#     EMBCOMPRESS_LIBRARY=PATH benchmarks/gpu.sh    # a library that was built elsewhere
#
# Needs a CUDA build of torch, nvcc and a C++ compiler, pytest and hypothesis; fbgemm-gpu is compared
# where it is installed. Takes less than nine minutes: every step has a limit, and a step that fails
# does not keep the others from running, but for the build. Exits with 1 if any did.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-gpu-results}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
LIMIT=${LIMIT:-530}
FAILED=0
: >"$OUT/summary.txt"

# step NAME SECONDS COMMAND…: runs it with a limit, its output in $OUT/NAME.log. At the limit it is
# interrupted first, so that pytest still says what failed.
step() {
    local name=$1 limit=$2 left=$((LIMIT - SECONDS)) begin=$SECONDS code=0
    shift 2
    if ((left < limit)); then limit=$left; fi
    if ((limit < 5)); then
        echo "$name: no time left" | tee -a "$OUT/summary.txt"
        FAILED=1
        return
    fi
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1 || code=$?
    tail -n 25 "$OUT/$name.log"
    echo "$name: exit $code after $((SECONDS - begin)) s" | tee -a "$OUT/summary.txt"
    if ((code != 0)); then FAILED=1; fi
}

if [ -z "${EMBCOMPRESS_LIBRARY:-}" ]; then
    # Machine code for this device alone: the build is most of the time otherwise.
    export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c \
        'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}
    export EMBCOMPRESS_BUILD_EXTENSION=1 EMBCOMPRESS_BUILD_CUDA=1
    step build 170 "$PYTHON" setup.py build_ext --inplace
    if ((FAILED)); then exit 1; fi
fi

# A line for every test as it ends, for when the time is up; stacks of one that hangs. Eight
# processes with as many threads each as there are cores would wait for each other most of the time.
WORKERS=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then WORKERS=(-n 8); fi
OMP_NUM_THREADS=1 step tests 150 "$PYTHON" -m pytest -vv -rfE --tb=short --durations=10 \
    --junitxml="$OUT/tests.xml" -o faulthandler_timeout=60 -p no:cacheprovider -p no:benchmark \
    "${WORKERS[@]}" -m "cuda and not slow" tests/cuda tests/engine
grep -aoE "(FAILED|ERROR) +tests/[^ ]+|node down.*|=+ .*(passed|failed).* =+" "$OUT/tests.log" |
    sort -u | tee -a "$OUT/summary.txt"

# The sanitizer needs a hundred seconds after it.
LEFT=$((LIMIT - SECONDS - 115))
step benchmark "$((LEFT + 15))" "$PYTHON" benchmarks/gpu.py --out "$OUT/gpu.json" --seconds "$LEFT"

SANITIZER=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
if [ -x "$SANITIZER" ]; then
    for tool in memcheck racecheck; do
        OMP_NUM_THREADS=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" 50 \
            "$SANITIZER" --tool "$tool" --error-exitcode 9 --target-processes all \
            "$PYTHON" -m pytest -q -p no:cacheprovider -m cuda tests/cuda/test_sanitized.py
    done
else
    echo "no compute-sanitizer" | tee -a "$OUT/summary.txt"
fi

exit "$FAILED"
