#!/bin/bash
# The CUDA kernels on a real GPU, in stages of less than nine minutes each:
#
#   benchmarks/gpu_session.sh 1 OUT   build for this GPU's architecture; correctness, and the host
#                                     twin's instructions beside the GPU's
#   benchmarks/gpu_session.sh 2 OUT   compute-sanitizer: memcheck, racecheck, synccheck
#   benchmarks/gpu_session.sh 3 OUT   4-bit speed beside torch's int4 product and cuBLAS in bf16
#   benchmarks/gpu_session.sh 4 OUT   8-bit speed beside torch._scaled_mm, torch._int_mm and cuBLAS;
#                                     quantizers beside a copy
#   benchmarks/gpu_session.sh 5 OUT   4-bit floats beside W4A16 and cuBLAS in bf16
#   benchmarks/gpu_session.sh 6 OUT   paged attention beside torch's SDPA in bf16
#   benchmarks/gpu_session.sh 7 OUT   Hadamard products beside torch's, and rows without them
#
# OUT is a folder for the results. Needs csrc/, quantkit/, benchmarks/, nvcc, cmake, ninja and a
# CUDA build of torch in PYTHON (third argument, default python3); no network.
set -euo pipefail
stage=${1:?usage: gpu_session.sh STAGE OUT [PYTHON]}
out=${2:?usage: gpu_session.sh STAGE OUT [PYTHON]}
python=${3:-python3}
cd "$(dirname "$0")/.."
mkdir -p "$out"

build() {
  local arch
  arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  [ "$arch" = 90 ] && arch=90a
  cmake -S . -B build/gpu -G Ninja -DPython_EXECUTABLE="$(command -v "$python")" \
    -DQUANTKIT_CUDA=ON -DQUANTKIT_CUDA_ARCHS="$arch" -DCMAKE_BUILD_TYPE=Release
  cmake --build build/gpu --target quantkit_cpu quantkit_cuda
  nvcc -O2 -std=c++17 -gencode "arch=compute_$arch,code=sm_$arch" -Xcompiler=-fPIC -shared \
    -I csrc/include csrc/tests/twin_probes.cu -o build/gpu/libprobes.so
}

case "$stage" in
  1)
    build >"$out/build.log" 2>&1 || { tail -50 "$out/build.log"; exit 1; }
    "$python" -m benchmarks.gpu_w4a16 probes build/gpu/libprobes.so | tee "$out/probes.txt"
    "$python" -m benchmarks.gpu_w4a16 check | tee "$out/check.txt"
    "$python" -m benchmarks.gpu_w8 check | tee "$out/check_w8.txt"
    "$python" -m benchmarks.gpu_fp4 check | tee "$out/check_fp4.txt"
    "$python" -m benchmarks.gpu_attention check | tee "$out/check_attention.txt"
    "$python" -m benchmarks.gpu_hadamard check | tee "$out/check_hadamard.txt"
    ;;
  2)
    for tool in memcheck racecheck synccheck; do
      for module in gpu_w4a16 gpu_w8 gpu_fp4 gpu_attention gpu_hadamard; do
        log="$out/$tool-$module.txt"
        compute-sanitizer --tool "$tool" --error-exitcode 1 \
          "$python" -m "benchmarks.$module" check --small >"$log" 2>&1 ||
          { tail -40 "$log"; exit 1; }
        echo "$tool $module: $(tail -1 "$log")"
      done
    done
    ;;
  3)
    "$python" -m benchmarks.gpu_w4a16 bench --json "$out/w4a16.json" | tee "$out/w4a16.txt"
    ;;
  4)
    "$python" -m benchmarks.gpu_w8 bench --json "$out/w8.json" | tee "$out/w8.txt"
    ;;
  5)
    "$python" -m benchmarks.gpu_fp4 bench --json "$out/fp4.json" | tee "$out/fp4.txt"
    ;;
  6)
    "$python" -m benchmarks.gpu_attention bench --json "$out/attention.json" |
      tee "$out/attention.txt"
    ;;
  7)
    "$python" -m benchmarks.gpu_hadamard bench --json "$out/hadamard.json" | tee "$out/hadamard.txt"
    ;;
  *)
    echo "stage $stage is unknown; use 1 to 7" >&2
    exit 2
    ;;
esac
