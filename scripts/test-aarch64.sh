#!/usr/bin/env bash
# Compiles the kernels for Arm (AArch64), counts the instructions that each variant is there for, and compares the kernels
# with nested loops on emulated processors with baseline NEON, with dot products, and with INT8 matrix products.
#
#   scripts/test-aarch64.sh [PYTHON]
#
# PYTHON needs hatchling, whose build hook of this project compiles. The script needs a cross compiler and an emulator:
#   apt install g++-aarch64-linux-gnu qemu-user
# On an Arm machine it compiles and runs natively, with the variants that this machine has.
set -euo pipefail

python=${1:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

if [ "$(uname -m)" = aarch64 ]; then
  prefix="" compiler=${CXX:-g++}
else
  prefix=aarch64-linux-gnu- compiler=aarch64-linux-gnu-g++
fi
for tool in "$compiler" "${prefix}objdump" $([ -z "$prefix" ] || echo qemu-aarch64); do
  command -v "$tool" > /dev/null || { echo "error: no $tool; apt install g++-aarch64-linux-gnu qemu-user" >&2; exit 2; }
done
echo "== compile with $("$compiler" --version | head -1)"
"$python" "$root/tests/kernels/native/build.py" "$folder" --compiler "$compiler"

echo "== instructions"
failed=0
count() { # VARIANT INSTRUCTION
  "${prefix}objdump" -d --no-show-raw-insn "$folder/$1.o" | awk -v name="$2" '$2 == name { n++ } END { print n + 0 }'
}
expect() { # VARIANT yes|no INSTRUCTION...
  local variant=$1 wanted=$2 name n
  shift 2
  for name in "$@"; do
    n=$(count "$variant" "$name")
    printf '%-8s %-7s %5d\n' "$variant" "$name" "$n"
    if [ "$wanted" = yes ] && [ "$n" = 0 ] || [ "$wanted" = no ] && [ "$n" != 0 ]; then
      echo "error: variant $variant, instruction $name: expected $([ "$wanted" = yes ] && echo some || echo none)" >&2
      failed=1
    fi
  done
}
expect neon yes fmla smlal smlal2
expect neon no sdot udot usdot smmla usmmla
expect dotprod yes fmla sdot
expect dotprod no usdot smmla usmmla
expect i8mm yes fmla usmmla
for shared in library work dispatch generic; do expect "$shared" no sdot usmmla; done
[ $failed = 0 ] || exit 1

if [ -z "$prefix" ]; then
  echo "== kernels on this processor"
  "$folder/check"
  exit
fi
compare() { # NAME CPU BEST OTHERS
  echo "== kernels on an emulated $1 (-cpu $2)"
  qemu-aarch64 -cpu "$2" -L /usr/aarch64-linux-gnu "$folder/check" "${@:3}"
}
compare "Cortex-A72: baseline" cortex-a72 neon generic
compare "Neoverse N1: dot products" neoverse-n1 dotprod neon generic
compare "processor with everything: matrix products" max i8mm dotprod neon generic
