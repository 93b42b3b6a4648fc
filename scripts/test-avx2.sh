#!/usr/bin/env bash
# Runs tests as on an x86-64 processor with AVX2 and FMA, without AVX-512 and VNNI.
#
#   scripts/test-avx2.sh [--emulated] PYTHON [pytest arguments]
#
# For machines whose own processor has more. Without --emulated the tests run on the processor itself, at its speed:
# every library is made to choose its AVX2 routines. ONNX Runtime has no switch for that; a copy of it asks a handler
# instead of the processor (scripts/avx2). Needs a C compiler and objdump.
# With --emulated an emulator runs them that has no AVX-512 (Debian's package qemu-user, 7.2 or later): it proves that
# no such instruction is executed, and takes 10 to 50 times as long.
# Python processes that a test starts run the same way.
set -euo pipefail

emulated=
if [[ ${1:-} == --emulated ]]; then emulated=yes; shift; fi
python=${1:?usage: scripts/test-avx2.sh [--emulated] PYTHON [pytest arguments]}
shift
case $python in */*) ;; *) python=$(command -v "$python") ;; esac
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

if [[ $emulated ]]; then
  command -v qemu-x86_64 > /dev/null || { echo "error: no qemu-x86_64; install qemu-user 7.2 or later" >&2; exit 2; }
  printf '#!/usr/bin/env bash\nexec qemu-x86_64 -cpu max "%s" "$@"\n' "$python" > "$folder/python"
  chmod +x "$folder/python"
  printf 'import sys\nsys.executable = "%s/python"\n' "$folder" > "$folder/sitecustomize.py"
  unset MOEBIUS_KERNELS
  # No guard pages behind tensors, which the tests on the processor itself have: qemu 7.2 reads 16 bytes where a scalar
  # FMA (vfnmadd213ss with an operand in memory) reads 4, and ends with SIGSEGV before a page without access.
  export MOEBIUS_TESTS_UNGUARDED=1
  python=$folder/python
else
  command -v objdump > /dev/null || { echo "error: no objdump; install binutils" >&2; exit 2; }
  "$python" "$here/avx2/onnxruntime_without_avx512.py" "$folder"
  "${CC:-cc}" -O1 -shared -fPIC -o "$folder/cpuid_mask.so" "$here/avx2/cpuid_mask.c" -ldl
  export LD_PRELOAD="$folder/cpuid_mask.so${LD_PRELOAD:+:$LD_PRELOAD}"
  export MOEBIUS_KERNELS=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
  export OPENBLAS_CORETYPE=Haswell
fi
export PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}"

"$python" -c '
from moebius_runtime import kernels
from moebius_runtime.backends import ort_integer
words = kernels.in_words()
print("compiled kernels " + words + ", ONNX Runtime saturates:", ort_integer.saturates())
if not (words == "avx2" or words.startswith("none")) or not ort_integer.saturates():
    raise SystemExit("error: this processor still shows more than AVX2")
'
"$python" -m pytest -p no:cacheprovider "$@"
