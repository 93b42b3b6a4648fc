#!/usr/bin/env bash
# Runs doctor, engine build, comparison with ort-cpu and benchmark on a device, and packs their results into one file.
# Pictures are never packed; names of user, home folder and host only with --with-names.
set -euo pipefail

usage() {
  cat <<'END'
collect-jetson.sh BUNDLE [options]
  BUNDLE            folder that `moebius-export onnx` wrote
  --out FILE        the packed results (moebius-results.tar.gz)
  --precision P     fp16 (default), fp32 or bf16
  --runtime R       tensorrt (default) or tensorrt-rtx
  --steps N         inference steps of each picture (20)
  --rounds N        rounds of the benchmark (3)
  --picture FILE    a picture and ...
  --mask FILE       ... its mask, in place of the demo's
  --skip-build      use the engines of the bundle
  --with-names      keep the names of user, home folder and host in the results
Exit code: 0 if every step succeeded, 1 if one failed (the results are packed anyway), 2 for wrong usage.
END
}

refuse() {
  echo "error: $1" >&2
  exit 2
}

bundle='' out=moebius-results.tar.gz precision=fp16 runtime=tensorrt steps=20 rounds=3 picture='' mask=''
build=yes names=no
while [ $# -gt 0 ]; do
  case $1 in
    --help) usage; exit 0 ;;
    --skip-build) build=no ;;
    --with-names) names=yes ;;
    --out | --precision | --runtime | --steps | --rounds | --picture | --mask)
      [ $# -ge 2 ] || refuse "$1 needs a value; see --help"
      case $1 in
        --out) out=$2 ;;
        --precision) precision=$2 ;;
        --runtime) runtime=$2 ;;
        --steps) steps=$2 ;;
        --rounds) rounds=$2 ;;
        --picture) picture=$2 ;;
        --mask) mask=$2 ;;
      esac
      shift ;;
    -*) refuse "unknown option $1; see --help" ;;
    *)
      [ -z "$bundle" ] || refuse "one BUNDLE is expected, got $bundle and $1"
      bundle=$1 ;;
  esac
  shift
done

[ -n "$bundle" ] || refuse "no BUNDLE was named; see --help"
[ -f "$bundle/manifest.json" ] || refuse "$bundle has no manifest.json; name a folder that moebius-export onnx wrote"
case $precision in fp16 | fp32 | bf16) ;; *) refuse "--precision $precision: expected fp16, fp32 or bf16" ;; esac
case $runtime in tensorrt | tensorrt-rtx) ;; *) refuse "--runtime $runtime: expected tensorrt or tensorrt-rtx" ;; esac
case $steps$rounds in *[!0-9]*) refuse "--steps $steps --rounds $rounds: expected whole numbers" ;; esac
demo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/docs/demo
if [ -z "$picture" ] && [ -z "$mask" ]; then
  picture=$demo/photo.jpg mask=$demo/mask.png
fi
for file in "$picture" "$mask"; do
  [ -f "$file" ] || refuse "no file ${file:-named}; give both --picture and --mask"
done
[ -d "$(dirname "$out")" ] || refuse "--out $out: its folder does not exist"
for program in moebius-export moebius-inpaint moebius-bench tar; do
  command -v "$program" >/dev/null || refuse "$program is not installed, or its environment is not active"
done

work=$(mktemp -d)
results=$work/results
watcher=''
# shellcheck disable=SC2317  # the trap calls it
finish() {
  [ -z "$watcher" ] || kill "$watcher" 2>/dev/null || true
  rm -rf "$work" "$out.part"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
mkdir -p "$results" "$work/ort-cpu" "$work/$runtime" "$work/masks"
failed=0

# step NAME COMMAND...: writes the output to NAME.log, and exit code and seconds to summary.txt.
step() {
  local name=$1 code=0 begin=$SECONDS
  shift
  echo "== $name" >&2
  "$@" >"$results/$name.log" 2>&1 || code=$?
  echo "$name: exit code $code, $((SECONDS - begin)) s: $*" >>"$results/summary.txt"
  if [ "$code" -ne 0 ]; then
    failed=1
    echo "   exit code $code; its last line: $(tail -n 1 "$results/$name.log")" >&2
  fi
}

# note NAME COMMAND...: writes the output of an optional program to NAME.txt; a failure is ignored.
note() {
  local name=$1
  shift
  if command -v "$1" >/dev/null; then
    "$@" >"$results/$name.txt" 2>&1 || true
  fi
}

# picture_with RUNTIME PRECISION: inpaints the masked region.
# shellcheck disable=SC2317  # step calls it
picture_with() {
  moebius-inpaint "$picture" --mask "$mask" --bundle "$bundle" --runtime "$1" --precision "$2" --steps "$steps" \
    --seed 0 --out "$work/$1/picture.png"
}

if command -v tegrastats >/dev/null; then
  tegrastats --interval 1000 >"$results/tegrastats.log" 2>&1 &
  watcher=$!
fi
note packages dpkg-query --show 'cuda-*' 'libnvinfer*' 'nvidia-jetpack' 'nvidia-l4t-core' 'python3-libnvinfer*'
note power-mode nvpmodel -q
note release cat /etc/nv_tegra_release
note memory-before free -m

step doctor-before moebius-export doctor "$bundle" --json "$results/doctor-before.json"
if [ "$build" = yes ]; then
  step build moebius-export trt "$bundle" "--$precision" --backend "$runtime"
  step doctor-after moebius-export doctor "$bundle" --json "$results/doctor-after.json"
fi
step picture-engine picture_with "$runtime" "$precision"
step picture-ort-cpu picture_with ort-cpu fp32
if [ -f "$work/$runtime/picture.png" ] && [ -f "$work/ort-cpu/picture.png" ]; then
  cp "$mask" "$work/masks/picture.${mask##*.}"
  step quality moebius-bench quality --real "$work/ort-cpu" --fake "$work/$runtime" --mask "$work/masks" \
    --json "$results/quality-against-ort-cpu.json"
else
  echo "quality: not run, a picture is missing" >>"$results/summary.txt"
fi
step bench moebius-bench run "$bundle" --runtime "$runtime" --precision "$precision" --steps "$steps" \
  --rounds "$rounds" --json "$results/bench.json"
note memory-after free -m

if [ -n "$watcher" ]; then
  kill "$watcher" 2>/dev/null || true
  wait "$watcher" 2>/dev/null || true
  watcher=''
fi

# hide TEXT WORD: replaces TEXT by WORD in every result, if TEXT is a whole word.
hide() {
  local pattern once
  if [ -n "$1" ] && [ "$1" != / ]; then
    pattern=$(printf '%s' "$1" | sed 's/[][\.*^$+?(){}|#]/\\&/g')
    once="s#(^|[^A-Za-z0-9_])$pattern([^A-Za-z0-9_]|\$)#\\1$2\\2#g"
    find "$results" -type f -exec sed -i -E "$once; $once" {} + # twice: adjacent matches share a separator
  fi
}
if [ "$names" = no ]; then
  hide "$work" WORK
  hide "$(cd "$bundle" && pwd)" BUNDLE
  hide "${HOME:-}" HOME
  hide "$(uname -n)" HOST
  hide "$(id -un)" USER
fi
tar -C "$work" -czf "$out.part" results
mv "$out.part" "$out"
cat "$results/summary.txt" >&2
echo "$out"
exit "$failed"
