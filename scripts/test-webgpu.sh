#!/bin/sh
# Runs the tests of the runtimes that need packages beside the usual ones, each in an environment of its own:
#   .venv-webgpu    the wheel onnxruntime-webgpu, which conflicts with onnxruntime: WebGPU on a Vulkan driver in software
#   .venv-plugins   onnxruntime with its plugin providers, and OpenVINO
# Usage: scripts/test-webgpu.sh PYTHON_OF_THE_EXPORT. Needs chromium (Debian), which ships the driver SwiftShader.
# VK_DRIVER_FILES chooses another driver. Takes minutes: the driver computes on the CPU.
set -eu

python=$1
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

environment() {  # NAME PACKAGE...
  name=$1
  shift
  [ -x "$name/bin/python" ] || "${PYTHON:-python3}" -m venv "$name"
  "$name/bin/python" -m pip install --quiet . onnx pytest filelock hypothesis "$@"
}

environment .venv-plugins onnxruntime onnxruntime-ep-webgpu onnxruntime-ep-openvino openvino
.venv-plugins/bin/python -m pytest tests/runtime/test_ort_plugin.py tests/runtime/test_openvino.py

environment .venv-webgpu onnxruntime-webgpu
if [ -z "${VK_DRIVER_FILES:-}" ]; then
  folder=${SWIFTSHADER:-/usr/lib/chromium}
  [ -f "$folder/libvk_swiftshader.so" ] || { echo "no $folder/libvk_swiftshader.so: apt install chromium" >&2; exit 2; }
  printf '{"file_format_version": "1.0.0", "ICD": {"library_path": "%s", "api_version": "1.3.0"}}\n' \
    "$folder/libvk_swiftshader.so" >"$work/swiftshader.json"
  export VK_DRIVER_FILES="$work/swiftshader.json" LD_LIBRARY_PATH="$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
fi
"$python" -m moebius_export.commands.app onnx --preset tiny --weights stand-in --vae stand-in --target webgpu \
  --out "$work/tiny"
export XDG_RUNTIME_DIR="$work" MOEBIUS_WEBGPU_BUNDLE="$work/tiny"
.venv-webgpu/bin/python -m pytest tests/webgpu
