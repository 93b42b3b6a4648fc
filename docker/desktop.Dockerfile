# moebius-edge on a Linux PC with an NVIDIA GPU. Two targets:
#   docker build --file docker/desktop.Dockerfile --target rtx --tag moebius-edge:rtx .            RTX GPUs, small
#   docker build --file docker/desktop.Dockerfile --target tensorrt --tag moebius-edge:tensorrt .  any GPU from Turing up
# Run one (a bundle in ./moebius-bundle, which user 10001 must be able to write engines into):
#   docker run --rm --gpus all --volume "$PWD:/data" moebius-edge:rtx moebius-export doctor
# Neither contains PyTorch: export on the host, or in an environment with moebius-edge[export].

# Builds the wheel with compiled CPU kernels; the compiler is not in the final image.
FROM python:3.12.8-slim-bookworm AS wheel
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY moebius moebius
COPY export export
COPY runtimes runtimes
COPY benchmarks benchmarks
COPY calibration calibration
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# TensorRT-RTX from its wheel. Of CUDA it needs only the driver, 580 or later, which --gpus all mounts.
FROM python:3.12.8-slim-bookworm AS rtx
COPY --from=wheel /wheels /wheels
RUN wheel="$(ls /wheels/*.whl)" \
 && pip install --no-cache-dir "moebius-edge[trt,trt-rtx,ort] @ file://$wheel" \
 && rm -rf /wheels \
 && useradd --uid 10001 --create-home moebius
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001
WORKDIR /data
CMD ["moebius-export", "doctor"]

# TensorRT 10.11 and CUDA 12.9 with Ubuntu 24.04 and Python 3.12, as NVIDIA packages them.
FROM nvcr.io/nvidia/tensorrt:25.06-py3 AS tensorrt
COPY --from=wheel /wheels /wheels
RUN python3 -m venv --system-site-packages /opt/moebius \
 && wheel="$(ls /wheels/*.whl)" \
 && /opt/moebius/bin/pip install --no-cache-dir "moebius-edge[trt,ort] @ file://$wheel" "cuda-bindings<13" \
 && rm -rf /wheels \
 && useradd --uid 10001 --create-home moebius
ENV PATH=/opt/moebius/bin:$PATH
USER 10001
WORKDIR /data
CMD ["moebius-export", "doctor"]
