# `attnpack serve` on a CPU.
#
#   docker build -t attnpack .
#   docker run -p 8000:8000 -v attnpack-home:/home/attnpack attnpack MODEL --host 0.0.0.0
#
# The volume keeps models that were downloaded, and what Inductor has compiled. PyTorch's package on PyPI brings CUDA's
# libraries; with the index of its CPU builds, `--build-arg PIP_EXTRA_INDEX_URL=...`, the image is several GB smaller.
FROM python:3.12-slim

# Inductor compiles C++ while the server runs. The version of a compiler is the base image's choice.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 attnpack

ARG TORCH=torch==2.13.0
ARG PIP_EXTRA_INDEX_URL=
# The version stands in TORCH.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "$TORCH"

WORKDIR /src
COPY . .
# TORCH again, so that the version that is installed stays.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[serve]" "$TORCH"

# As a number, which an orchestrator can tell from root.
USER 10001
WORKDIR /home/attnpack
ENV HF_HOME=/home/attnpack/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/home/attnpack/inductor \
    PYTHONUNBUFFERED=1
VOLUME /home/attnpack

EXPOSE 8000
# The first load of a model takes minutes.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["attnpack", "serve"]
