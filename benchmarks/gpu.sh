#!/usr/bin/env bash
# Everything that needs a GPU, in one run without a network: build, tests, compute-sanitizer, benchmarks.
#
#   benchmarks/gpu.sh [--out FOLDER] [--sections build,tests,sanitizer,benchmarks,goldens] [--python PYTHON]
#                     [--data SOURCES]
#
# Not all of it fits into one run, so goldens is left out unless it is asked for: all decoding of the original on the
# GPU, and with --data (JSON lines with src, maybe .xz) how many of 500 outputs each dtype leaves as on the CPU in fp32.
# What each section printed is in FOLDER (default: $OUT, else gpu-results), with summary.txt, results.json and
# results.png. Each section has a time limit, and all together end within 9 minutes, whatever is left for the last.
# A section that fails does not stop the next ones but makes the exit status 1; what was not run is named at the end.
# For all benchmarks with all their compiled peers, ask for them alone: --sections benchmarks.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-gpu-results}
sections=build,tests,sanitizer,benchmarks
python=${PYTHON:-python3}
data=
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=${2:?--out needs a folder} ;;
    --sections) sections=${2:?--sections needs a list} ;;
    --python) python=${2:?--python needs a program} ;;
    --data) data=${2:?--data needs a file} ;;
    *) echo "error: unknown argument $1" >&2; exit 2 ;;
  esac
  shift 2
done
for section in ${sections//,/ }; do
  case $section in
    build | tests | sanitizer | benchmarks | goldens) ;;
    *) echo "error: --sections: there is no section $section" >&2; exit 2 ;;
  esac
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
summary=$out/summary.txt
: >"$summary"
status=0
deadline=535
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

say() { echo "$*" | tee -a "$summary"; }
wanted() { case ",$sections," in *",$1,"*) return 0 ;; *) return 1 ;; esac }

# run NAME SECONDS COMMAND...: its output goes to NAME.txt.
run() {
  local name=$1 limit=$2 begin=$SECONDS left=$((deadline - SECONDS)) code
  shift 2
  [ "$limit" -gt "$left" ] && limit=$left
  if [ "$limit" -lt 1 ]; then
    say "$name: NOT RUN: no time was left"
    status=1
    return 1
  fi
  timeout "$limit" "$@" >"$out/$name.txt" 2>&1
  code=$?
  if [ $code -eq 0 ]; then
    say "$name: passed in $((SECONDS - begin)) s"
  else
    [ $code -eq 124 ] && say "$name: NOT FINISHED within $limit s" || say "$name: FAILED with status $code"
    tail -n 15 "$out/$name.txt"
    status=1
  fi
  return $code
}

build() {
  local folder=build/gpu  # kept, so that a second run builds only what has changed
  local architecture
  architecture=$("$python" -c 'import torch; print("%d%d-real" % torch.cuda.get_device_capability(0))') &&
    "$python" -m cmake -S . -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=Release -DMINILM_FAST_CUDA=ON \
    -DCMAKE_CUDA_ARCHITECTURES="$architecture" \
    -DPython_EXECUTABLE="$(command -v "$python")" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" &&
    "$python" -m ninja -C "$folder" && cp "$folder"/_C*.so minilm_fast/
}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "error: PyTorch of $python finds no GPU: nothing was run" >&2
  exit 1
fi
"$python" - <<'END' | tee -a "$summary"
import torch
p = torch.cuda.get_device_properties(0)
print(f"{p.name}, capability {p.major}.{p.minor}, {p.total_memory >> 30} GiB; torch {torch.__version__}, CUDA {torch.version.cuda}")
END

if wanted build; then
  if ! command -v nvcc >/dev/null; then
    say "build: NOT RUN: there is no nvcc"
    status=1
  else
    export -f build
    export out python
    run build 200 bash -c build
  fi
fi

if wanted tests; then
  run tests 150 "$python" -m pytest -p no:cacheprovider -m gpu tests/test_cuda_device.py \
    tests/test_cuda_goldens.py tests/test_cuda_encode.py tests/test_ops_adamw.py
  run triton 100 "$python" -m pytest -p no:cacheprovider tests/test_triton_attention.py tests/test_triton_relation_kl.py \
    tests/test_triton_loss.py tests/test_triton_norm.py
fi

if wanted sanitizer; then
  if ! command -v compute-sanitizer >/dev/null; then
    say "sanitizer: NOT RUN: there is no compute-sanitizer"
  else
    for tool in memcheck racecheck; do
      run $tool 60 compute-sanitizer --tool $tool --error-exitcode 9 --target-processes all \
        "$python" -m pytest -p no:cacheprovider -k small tests/test_cuda_device.py
    done
  fi
fi

if wanted goldens; then
  run goldens 300 "$python" -m tests.parity --device cuda
  if [ -z "$data" ]; then
    say "agreement: NOT RUN: --data names no sources"
  else
    run agreement 300 "$python" benchmarks/dtype_agreement.py --device cuda --data "$data" --limit 500 \
      --model examples/question-generation --threads "$(nproc)" --json "$out/agreement.json" &&
      cat "$out/agreement.txt"
  fi
fi

if wanted benchmarks; then
  run benchmarks $deadline "$python" benchmarks/gpu.py --json "$out/results.json" --plot "$out/results.png" &&
    cat "$out/benchmarks.txt"
fi

for section in build tests sanitizer benchmarks goldens; do
  wanted $section || say "$section: NOT RUN: it was not asked for"
done
exit $status
