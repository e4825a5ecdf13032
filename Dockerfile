# docker build -t lenvm . && docker run --rm lenvm lenvm generate --equal-to 96 "Write a text about the sea."
FROM python:3.12-slim
COPY . /src
RUN pip install --no-cache-dir /src && rm -rf /src
RUN useradd --create-home user
USER user
WORKDIR /home/user
CMD ["lenvm", "--help"]
