# The image of every Pod in k8s/: Python, Ray, torch and Mobula with its kernels compiled, for one user without rights.
#
#   docker build -t mobula-serve:0.1.0 .                                              CPU, or CUDA, as TORCH_INDEX_URL has it
#   docker build --build-arg TORCH_INDEX_URL=... -t mobula-serve:0.1.0-cuda .
#
# CUDA needs no other base: torch's CUDA build brings the libraries, the node's driver and device plugin the rest.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/mobula
ENV PATH=/opt/mobula/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# torch and Ray first: they are large and change seldom. Ray's version is the one that k8s/ names.
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX_URL=
RUN pip install "torch==${TORCH_VERSION}" ${TORCH_INDEX_URL:+--index-url "${TORCH_INDEX_URL}"}
ARG RAY_VERSION=2.60.0
RUN pip install "ray[serve]==${RAY_VERSION}"
COPY . /src
RUN pip wheel --no-deps --wheel-dir /wheels /src
RUN pip install /wheels/*.whl "ray[serve]==${RAY_VERSION}"
# An extension that did not compile is left out in silence where people install; an image without kernels is a fault.
RUN python3 -c "from experts.kernels.library import native; from router import compiled; assert native() and compiled.native()"
RUN mobula --version

FROM ${PYTHON_IMAGE}
# wget: the probes that KubeRay gives Pods without their own call it.
RUN apt-get update && apt-get install --yes --no-install-recommends wget && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp mobula
COPY --from=build /opt/mobula /opt/mobula
ENV PATH=/opt/mobula/bin:$PATH PYTHONUNBUFFERED=1
USER 10001:10001
CMD ["mobula", "--help"]
