# An image for NVIDIA GPUs: docker build -t arvideo . && docker run --gpus all --shm-size 8g -it arvideo
# It was not built where this project is developed. tests/test_dockerfile.py compares its steps with the Makefile.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04
# torch.compile needs a C++ compiler and the headers of Python.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends g++ git make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /arvideo
COPY . .
RUN make setup EXTRAS=dev,xformers
ENV PATH=/arvideo/.venv/bin:$PATH
CMD ["python", "-m", "pipelines.doctor"]
