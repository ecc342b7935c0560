# mice_jax with its command as the entry point, for CPUs or for NVIDIA GPUs.
#
#   docker build --tag mice_jax .                                                       # CPU
#   docker build --tag mice_jax:cuda --build-arg EXTRAS=cuda,hf,lab .                   # GPU
#   docker run --rm --gpus=all --user="$(id -u)" --volume="$PWD:/work" mice_jax:cuda \
#       train --config=my_run.py --workdir=run
#
# JAX brings its CUDA libraries along, so the GPU image needs no CUDA base image: the host needs NVIDIA's driver and its
# container toolkit.
FROM python:3.12-slim

# Comma-separated extras of the package (see pyproject.toml).
ARG EXTRAS=hf,lab

COPY pyproject.toml README.md LICENSE /opt/mice_jax/
COPY constraints /opt/mice_jax/constraints
COPY mice_jax /opt/mice_jax/mice_jax
RUN pip install --no-cache-dir --constraint=/opt/mice_jax/constraints/py312.txt "/opt/mice_jax[${EXTRAS}]"
COPY configs /opt/mice_jax/configs

# The user of `docker run --user` has no home: caches of compiled programs and of data sets go to a folder for everyone.
RUN useradd --uid=1000 mice && mkdir --mode=1777 /var/cache/mice_jax
ENV HOME=/var/cache/mice_jax \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

USER 1000
WORKDIR /work
ENTRYPOINT ["mice"]
CMD ["--help"]
