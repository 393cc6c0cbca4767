# The server as an image: `docker build -t openinteractions .`
# Sandboxes have an image of their own, images/sandbox. This one needs no docker command: the broker
# talks to the engine's socket.
FROM python:3.11-slim-bookworm AS build
WORKDIR /app
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# The packages change rarely: a layer of their own.
COPY requirements.lock ./
RUN python -m venv /venv && /venv/bin/pip install --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE alembic.ini ./
COPY src src
COPY migrations migrations
RUN /venv/bin/pip install --no-build-isolation --no-deps .

FROM python:3.11-slim-bookworm
# The embedded PostgreSQL and the kernel's checks want an account with a name.
RUN groupadd --gid 10001 openinteractions \
  && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin openinteractions \
  && install -d -o openinteractions -g openinteractions -m 0700 /data
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 OI_DATA_DIR=/data OI_LOCAL__MODELS_DIR=/data/models
WORKDIR /app
USER openinteractions
VOLUME /data
EXPOSE 8080
# Any answer below 500 is a sign of life.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
  CMD ["python", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8080, timeout=4); c.request('GET', '/healthz'); assert c.getresponse().status < 500"]
# PID 1 must pass signals on and reap orphans: run with `--init` (compose does).
ENTRYPOINT ["openinteractions"]
CMD ["serve", "--host", "0.0.0.0"]
