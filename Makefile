.DEFAULT_GOAL := help
.PHONY: help setup serve sandbox demo test check bench gap chaos lock
ARGS ?=

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install everything into .venv; again costs nothing
	@scripts/setup

serve: setup ## Start the server on http://127.0.0.1:8080 (ARGS="--port 9000")
	@.venv/bin/openinteractions serve $(ARGS)

sandbox: ## Have Docker (a bare Debian machine gets it) and the image that commands run in
	@scripts/docker
	@scripts/sandbox-image

demo: setup ## Show it working, step by step
	@.venv/bin/openinteractions demo $(ARGS)

test: ## Run the checks and all tests (ARGS="-k name" picks some)
	@scripts/test $(ARGS)

check: ## Run the checks alone: format, lint, imports, types
	@scripts/setup --dev
	@scripts/check

bench: ## Measure turns, sandboxes and the egress proxy against what they cannot avoid
	@scripts/setup --dev
	@scripts/docker
	@scripts/sandbox-image slim
	@.venv/bin/python -m benchmarks.run $(ARGS)
	@.venv/bin/python -m benchmarks.sandbox
	@.venv/bin/python -m benchmarks.egress

gap: ## Count runs that end well: a naive chain's, ours, and agents' in sandboxes
	@scripts/setup --dev
	@{ scripts/docker && scripts/sandbox-image slim; } || echo "==> going on without sandboxes"
	@.venv/bin/python -m benchmarks.gap $(ARGS)

chaos: ## Run 200 runs while everything is killed (ARGS="--runs 60 --seed 7")
	@scripts/setup --dev
	@.venv/bin/python -m tests.chaos.run $(ARGS)

lock: ## Renew the lock files from pyproject.toml (needs uv)
	@scripts/lock
