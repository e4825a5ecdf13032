# docker build -t lenvm . && docker run --rm lenvm lenvm generate --equal-to 96 "Write a text about the sea."
# The registry's build of torch runs on GPUs, too: docker run --gpus all …
FROM python:3.13-slim
WORKDIR /lenvm
COPY . .
RUN pip install --no-cache-dir .
CMD ["lenvm", "--help"]
