# moebius-inpaint on a CPU (x86-64 or Arm), without PyTorch.
#   docker build --file docker/cpu.Dockerfile --tag moebius-edge:cpu .
# Run it (a bundle in ./moebius-bundle, pictures in the working directory, which the user must be able to write into):
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/data" moebius-edge:cpu \
#     moebius-inpaint photo.jpg --mask mask.png --out out.jpg

# The wheel, with the CPU kernels compiled; the compiler stays behind.
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

FROM python:3.12.8-slim-bookworm AS cpu
COPY --from=wheel /wheels /wheels
RUN wheel="$(ls /wheels/*.whl)" \
 && pip install --no-cache-dir "moebius-edge[ort,heif] @ file://$wheel" \
 && rm -rf /wheels \
 && useradd --uid 10001 --create-home moebius
USER 10001
WORKDIR /data
CMD ["moebius-inpaint", "--help"]
