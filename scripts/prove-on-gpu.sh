#!/usr/bin/env bash
# Proves on a machine with an NVIDIA GPU what works and how fast: one report, as JSON and Markdown (docs/status.md).
# Runs from a checkout without an installation; nothing is downloaded. On a Jetson, without PyTorch and with a bundle that was
# exported elsewhere (docs/jetson.md): scripts/prove-on-gpu.sh --profile jetson --bundle BUNDLE
#   PYTHON=...   the interpreter, which should be the one that has PyTorch (python3)
#   WHEELS=DIR   wheels of packages that are missing there; unpacked into a temporary folder for this run
# Options are those of `python -m moebius_bench.hardware`; see --help.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
command -v "$python" >/dev/null || {
  echo "error: there is no $python; set PYTHON to the interpreter that has PyTorch" >&2
  exit 2
}
paths=$root:$root/export:$root/runtimes:$root/calibration:$root/benchmarks
if [ -n "${WHEELS:-}" ]; then
  [ -d "$WHEELS" ] || {
    echo "error: WHEELS=$WHEELS is no folder of wheels" >&2
    exit 2
  }
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl >&2
  paths=$paths:$site
fi
export PYTHONPATH=$paths${PYTHONPATH:+:$PYTHONPATH}
"$python" -c 'import numpy, pydantic, typer' 2>/dev/null || {
  echo "error: $python lacks packages of moebius-edge (numpy, pydantic, typer); set PYTHON to an interpreter that has them, such as .venv/bin/python after make setup" >&2
  exit 2
}
"$python" -m moebius_bench.hardware "$@"
