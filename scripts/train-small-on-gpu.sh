#!/usr/bin/env bash
# Trains the small network further on one CUDA GPU, with data drawn and encoded there: made for ten minutes (docs/small.md).
# Starts from the weights in moebius/small and runs its recipes `near` and `whole` with more samples.
#   scripts/train-small-on-gpu.sh OUT       OUT is a folder for data, checkpoints and weights; a second call continues there
#   PYTHON=...        the interpreter that has PyTorch, and diffusers, accelerate and scikit-image (python3)
#   DEVICE=cuda       of the encoder; training takes the GPU if there is one
#   PICTURES=6000     pictures of 256 pixels, each with MASKS=4 masks, and an eighth as many of 512 pixels
#   STEPS=3000        steps of BATCH=128 crops of 32x32 latents, then WHOLE_STEPS=500 of WHOLE_BATCH=32 of 64x64
#   PHOTOGRAPHS=DIR   unpacked packages with further photographs (docs/data.md)
#   THREADS=8         threads that draw pictures
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
[ $# -eq 1 ] || {
  echo "usage: scripts/train-small-on-gpu.sh OUT" >&2
  exit 2
}
command -v "$python" >/dev/null || {
  echo "error: there is no $python; set PYTHON to the interpreter that has PyTorch" >&2
  exit 2
}
out=$1 device=${DEVICE:-cuda} pictures=${PICTURES:-6000} threads=${THREADS:-8}
steps=${STEPS:-3000} batch=${BATCH:-128} whole_steps=${WHOLE_STEPS:-500} whole_batch=${WHOLE_BATCH:-32}
export PYTHONPATH=$root:$root/runtimes${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"
started=$SECONDS

distill() { "$python" -m moebius.distill.cli "$@"; }

more=()
[ -z "${PHOTOGRAPHS:-}" ] || more=("photographs:$PHOTOGRAPHS@4000")
encode() { # NAME COUNT OPTIONS...
  distill encode scenes:100000:753 photographs@4000 "${more[@]}" "$out/$1" --vae "$root/moebius/small/vae" --preset small \
    --count "$2" --masks painted --masks-per-picture "${MASKS:-4}" --starts --bf16 --device "$device" --threads "$threads" "${@:3}"
}

# The recipe NAME with this run's paths and lengths, as OUT/NAME.yaml.
recipe() { # NAME LATENTS INIT STEPS BATCH
  "$python" - "$root/moebius/small/recipe/$1.yaml" "$out" "$@" "$device" <<'PY'
import sys
from pathlib import Path

import yaml

path, out, name, latents, init, steps, batch, device = sys.argv[1:]
settings = yaml.safe_load(Path(path).read_text())
steps = int(steps)
settings["data"]["latents"] = f"{out}/{latents}"
settings |= {"out": f"{out}/{name}", "init": init, "steps": steps, "batch": int(batch), "save_every": max(steps // 4, 1)}
settings["schedule"]["cosine"] = steps
settings["average_statistics"] = min(settings["average_statistics"], steps)
if device.startswith("cuda"):
    settings["lambda_form"] = "fast"
Path(out, f"{name}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
PY
}

encode crops "$pictures" --size 256 --scene-size 512 --crop 0.48:0.65 --mask-side 256 --mask-most 0.4
encode pictures "$(((pictures + 7) / 8))" --crop 0.8:1
echo "== encoded after $((SECONDS - started)) s"
recipe near crops "$root/moebius/small/student" "$steps" "$batch"
[ -f "$out/near/config.json" ] || distill "$out/near.yaml" --resume
echo "== trained on crops after $((SECONDS - started)) s"
recipe whole pictures "$out/near" "$whole_steps" "$whole_batch"
[ -f "$out/whole/config.json" ] || distill "$out/whole.yaml" --resume
echo "== weights after $((SECONDS - started)) s: $out/whole"
echo "   moebius-export onnx --preset small --weights $out/whole --out BUNDLE"
echo "   moebius-bench inpaint BUNDLE --data scenes:24 --data photographs"
