# vugen in a container; docs/install.md has the commands.
# BASE is an image with Python 3.11 or later: for GPUs one that brings a CUDA build of torch and torchvision.
ARG BASE=python:3.12-slim
FROM ${BASE}

# CONSTRAINTS=/dev/null keeps the torch of the base; EXTRAS is a list as [serve,hf].
ARG CONSTRAINTS=constraints.txt
ARG EXTRAS=
# pip reads it: the index of torch builds for the CPU alone makes an image of a fifth of the size.
ARG PIP_EXTRA_INDEX_URL=

# torch.compile needs a compiler.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY recipes recipes
COPY vugen_cli vugen_cli
RUN PIP_BREAK_SYSTEM_PACKAGES=1 python -m pip install --no-cache-dir -c "$CONSTRAINTS" ".$EXTRAS" && rm -rf /src/*

# Anyone may run it (--user), so that what it writes into a mounted folder is theirs; torch asks for a name.
ENV HOME=/cache USER=vugen VUGEN_CACHE=/cache/vugen
RUN mkdir -m 777 /cache /work
WORKDIR /work
ENTRYPOINT ["vugen"]
CMD ["--help"]
