# syntax=docker/dockerfile:1
# quantpress in a container: `docker build --target cpu -t quantpress:cpu .`, or --target cuda.
#
#   docker run --rm -v "$PWD:/work" quantpress:cpu run w4a16-gptq --model smollm2-135m --out runs/first
#   docker run --rm --gpus all -v "$PWD:/work" -v ~/.cache/huggingface:/cache/huggingface quantpress:cuda doctor
#
# /work is the current folder, /cache holds the caches. EXTRAS adds extras, such as --build-arg EXTRAS=tasks,llamacpp-server
# for tasks and the smoke test of llama.cpp.

ARG PYTHON=3.12
ARG TORCH=2.13.0
ARG CUDA_IMAGE=pytorch/pytorch:2.11.0-cuda13.0-cudnn9-runtime

FROM python:${PYTHON}-slim-bookworm AS wheel
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir build==1.6.1 && python -m build --wheel --outdir /dist .

FROM python:${PYTHON}-slim-bookworm AS cpu
ARG TORCH
ARG EXTRAS=""
RUN pip install --no-cache-dir "torch==${TORCH}" --index-url https://download.pytorch.org/whl/cpu
COPY --from=wheel /dist /dist
RUN pip install --no-cache-dir "$(ls /dist/*.whl)${EXTRAS:+[$EXTRAS]}" && rm -rf /dist \
 && useradd --create-home --uid 1000 quantpress && mkdir -p /work /cache && chown quantpress /work /cache
ENV HF_HOME=/cache/huggingface QUANTPRESS_CACHE=/cache/quantpress PYTHONUNBUFFERED=1
USER 1000
WORKDIR /work
ENTRYPOINT ["quantpress"]
CMD ["--help"]

# The image's torch is kept: pip is told its version, so that no other is chosen.
FROM ${CUDA_IMAGE} AS cuda
ARG EXTRAS=""
COPY --from=wheel /dist /dist
RUN python -c 'import torch; print("torch==" + torch.__version__)' > /tmp/constraints.txt \
 && PIP_BREAK_SYSTEM_PACKAGES=1 pip install --no-cache-dir --constraint /tmp/constraints.txt "$(ls /dist/*.whl)${EXTRAS:+[$EXTRAS]}" \
 && rm -rf /dist /tmp/constraints.txt \
 && (id -u 1000 > /dev/null 2>&1 || useradd --create-home --uid 1000 quantpress) \
 && mkdir -p /work /cache && chown 1000 /work /cache
ENV HF_HOME=/cache/huggingface QUANTPRESS_CACHE=/cache/quantpress PYTHONUNBUFFERED=1
USER 1000
WORKDIR /work
ENTRYPOINT ["quantpress"]
CMD ["--help"]
