# The page and the HTTP API of moebius-serve on port 8080, on the CPU.
#   docker build --file docker/serve.Dockerfile --tag moebius-edge:serve .
# Run it (a bundle in ./moebius-bundle, the token in the environment, which the command line does not show):
#   docker run --rm --publish 8080:8080 --env MOEBIUS_TOKEN --volume "$PWD/moebius-bundle:/data/moebius-bundle:ro" moebius-edge:serve
# It refuses to start without a token. Reached by another name than localhost, add: moebius-serve --host 0.0.0.0 --allow-host NAME

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

FROM python:3.12.8-slim-bookworm AS serve
COPY --from=wheel /wheels /wheels
RUN wheel="$(ls /wheels/*.whl)" \
 && pip install --no-cache-dir "moebius-edge[ort,serve] @ file://$wheel" \
 && rm -rf /wheels \
 && useradd --uid 10001 --create-home moebius
EXPOSE 8080
# /health needs no token. Another port than 8080 needs another check: docker run --health-cmd ...
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=4)"]
USER 10001
WORKDIR /data
CMD ["moebius-serve", "--host", "0.0.0.0"]
