# The demo in a container, on the CPU:   docker build -t action-kernels . && docker run --rm -v "$PWD/runs:/runs" action-kernels
# With a GPU: build with --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 and run with --gpus all.
FROM python:3.12-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# PyTorch first: this layer stays when the sources change.
RUN pip install --no-cache-dir torch --index-url "$TORCH_INDEX"

COPY . /src
RUN pip install --no-cache-dir "/src[train]" && rm -rf /src

RUN useradd --create-home user && mkdir /runs && chown user /runs
USER user
WORKDIR /runs
VOLUME /runs

ENTRYPOINT ["action-kernels"]
CMD ["train", "--preset", "demo", "--output", "/runs/demo"]
