#!/usr/bin/env bash
# Runs tests on an emulated x86-64 processor with AVX2 and FMA, without AVX-512 and VNNI.
#
#   scripts/test-avx2.sh PYTHON [pytest arguments]
#
# For machines whose own processor has more: ONNX Runtime chooses its INT8 routines by the processor and has no switch.
# Needs qemu-x86_64 (Debian's package qemu-user, 7.2 or later), which emulates AVX2 and no AVX-512. Python processes that
# a test starts by `sys.executable` are emulated too. Emulation is 10 to 50 times slower than the processor.
set -euo pipefail

python=${1:?usage: scripts/test-avx2.sh PYTHON [pytest arguments]}
shift
case $python in */*) ;; *) python=$(command -v "$python") ;; esac
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
command -v qemu-x86_64 > /dev/null || { echo "error: no qemu-x86_64; install qemu-user 7.2 or later" >&2; exit 2; }

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
printf '#!/usr/bin/env bash\nexec qemu-x86_64 -cpu max "%s" "$@"\n' "$python" > "$folder/python"
chmod +x "$folder/python"
printf 'import sys\nsys.executable = "%s/python"\n' "$folder" > "$folder/sitecustomize.py"
export PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}"
unset MOEBIUS_KERNELS
# No guard pages behind tensors, which the tests on the processor itself have: qemu 7.2 reads 16 bytes where a scalar FMA
# (such as vfnmadd213ss with an operand in memory) reads 4, and ends with SIGSEGV before a page without access.
export MOEBIUS_TESTS_UNGUARDED=1

"$folder/python" -c '
from moebius_runtime import kernels
from moebius_runtime.backends import ort_integer
words = kernels.in_words()
print("emulated processor: compiled kernels " + words + ", ONNX Runtime saturates:", ort_integer.saturates())
if not (words == "avx2" or words.startswith("none")) or not ort_integer.saturates():
    raise SystemExit("error: the emulated processor has more than AVX2")
'
"$folder/python" -m pytest -p no:cacheprovider "$@"
