# moebius-edge on a Jetson Orin with JetPack 6.1 or 6.2 (Jetson Linux 36.4 and up). Build it on the Jetson:
#   docker build --file docker/jetson-jp6.Dockerfile --tag moebius-edge:jp6 .
# Run it (a bundle in ./moebius-bundle, which user 10001 must be able to write engines into):
#   docker run --rm --runtime nvidia --group-add video --volume "$PWD:/data" moebius-edge:jp6 moebius-export doctor
# See docs/jetson.md. TensorRT cannot be imported while the image is built: the device's own libraries, such as
# libnvdla_compiler.so, are mounted when a container starts with --runtime nvidia. `doctor` checks it.

# Builds the wheel with CPU kernels compiled for this machine; the compiler is not in the final image.
FROM ubuntu:22.04 AS wheel
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ python3-pip python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY moebius moebius
COPY export export
COPY runtimes runtimes
COPY benchmarks benchmarks
COPY calibration calibration
RUN python3 -m venv /opt/build \
 && /opt/build/bin/pip install --no-cache-dir --upgrade "pip>=24" \
 && /opt/build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# TensorRT 10.3 and CUDA 12.6, as JetPack 6 ships them; Python 3.10.
FROM nvcr.io/nvidia/l4t-tensorrt:r10.3.0-runtime
ARG TENSORRT=10.3.0.30-1+cuda12.5
# TensorRT's Python module, from NVIDIA's repository for Orin. The version is that of the image's libraries.
ADD --chmod=644 https://repo.download.nvidia.com/jetson/jetson-ota-public.asc /etc/apt/keyrings/jetson.asc
RUN for part in common t234; do \
      echo "deb [signed-by=/etc/apt/keyrings/jetson.asc] https://repo.download.nvidia.com/jetson/$part r36.4 main"; \
    done > /etc/apt/sources.list.d/jetson.list \
 && apt-get update \
 && apt-get install --yes --no-install-recommends python3-venv "python3-libnvinfer=$TENSORRT" \
 && rm -rf /var/lib/apt/lists/*
COPY --from=wheel /wheels /wheels
# --system-site-packages: TensorRT is a system package. CUDA 12 needs bindings older than 13.
RUN python3 -m venv --system-site-packages /opt/moebius \
 && /opt/moebius/bin/pip install --no-cache-dir --upgrade "pip>=24" \
 && wheel="$(ls /wheels/*.whl)" \
 && /opt/moebius/bin/pip install --no-cache-dir "moebius-edge[trt,ort] @ file://$wheel" "cuda-bindings<13" \
 && rm -rf /wheels \
 && useradd --uid 10001 --create-home moebius
ENV PATH=/opt/moebius/bin:$PATH
USER 10001
WORKDIR /data
CMD ["moebius-export", "doctor"]
