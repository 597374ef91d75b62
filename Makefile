# Everything a person or a CI machine types. Needs Python >= 3.11 with venv, git and make; `make help` lists it.
#
# The environment is .venv, built from requirements.lock alone, every file checked against its hash. It is rebuilt
# whole when pyproject.toml or requirements.lock changes and when an earlier build did not finish: the stamp is
# written last. Only relative paths are used, so the checkout may lie in a path with spaces.

PYTHON ?= python3
ARGS ?=
# Test processes: most of a test is waiting for another process.
WORKERS ?= 3
RUN ?= # a way to run modules under something, e.g. RUN="-m coverage run"

# The caller's Python settings must not reach ours; PYTHONDONTWRITEBYTECODE would hide the bug this project is about.
unexport PYTHONDONTWRITEBYTECODE PYTHONUNBUFFERED PYTHONPATH PYTHONHOME PYTHONSTARTUP VIRTUAL_ENV

# Where the tools are; `make test VENV=.venv-3.13 PYTHON=python3.13` runs the tests on another interpreter.
VENV := .venv
STAMP := $(VENV)/complete

# What `make bench` compares with is none of our dependencies and has an environment of its own.
PEERS := .venv-peers

SUPERVISING := service ends healing history ignored kill_matrix orphans output proof_at_work pipeline races soak web

# What `make page` looks with is none of our dependencies either, and lies in a folder of its own.
BROWSER := .venv-page

# What writes and checks the dashboard: Grafana's SDK and, where there is npm, its TypeScript types.
GRAFANA := .venv-grafana
TYPES := tests/grafana/types

.DEFAULT_GOAL := help
.PHONY: help demo test systemd page grafana generate cold soak gauntlet bench lint format lock ci

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

demo: $(STAMP) ## the whole product on invented messages; ARGS=--once runs a scripted tour and ends
	@$(VENV)/bin/wa-monitor demo $(ARGS)

test: $(STAMP) ## all tests; ARGS goes to pytest, e.g. ARGS="-k embedded"
	@$(VENV)/bin/python $(RUN) -m pytest --numprocesses=$(WORKERS) $(ARGS)

cold: $(STAMP) ## the tests that supervise processes once more, without the zygote: both ways behave the same
	@WA_TEST_NO_ZYGOTE=1 $(VENV)/bin/python -m pytest --numprocesses=$(WORKERS) $(ARGS) \
		$(foreach name,$(SUPERVISING),tests/supervisor/test_$(name).py) tests/test_incident_scenario.py

systemd: $(STAMP) ## the units under a real systemd, booted in namespaces: needs root, systemd and git, four minutes
	@WA_SYSTEMD=1 $(VENV)/bin/python -m pytest --timeout=300 $(ARGS) tests/systemd

soak: $(STAMP) ## what takes minutes: whole kill matrix, 200 reloads and 200 checkouts in a row, the monitor killed everywhere
	@WA_SOAK=1 $(VENV)/bin/python -m pytest --numprocesses=$(WORKERS) $(ARGS) \
		tests/supervisor/test_kill_matrix.py tests/supervisor/test_soak.py tests/supervisor/test_checkouts.py \
		tests/test_counts.py tests/supervisor/test_metrics.py tests/supervisor/test_watch_whole.py tests/supervisor/test_reexec.py tests/supervisor/test_zygote.py \
		tests/monitor/test_model.py

gauntlet: $(STAMP) ## stale bytecode and proof on every supported interpreter of this machine; ARGS=--others leaves out ours
	@bash .ci/gauntlet $(ARGS)

page: $(STAMP) $(BROWSER)/complete ## the status page in a real Chromium; WA_SCREENSHOTS=1 takes the pictures in docs/ anew
	@WA_PAGE_PACKAGES="$(CURDIR)/$(BROWSER)" $(VENV)/bin/python -m pytest $(ARGS) tests/page

grafana: $(STAMP) $(GRAFANA)/complete ## dashboard and alerts against a real Prometheus and Alertmanager, five minutes
	@WA_GRAFANA=$(GRAFANA) $(VENV)/bin/python -m pytest --numprocesses=$(WORKERS) $(ARGS) tests/grafana

generate: $(STAMP) $(GRAFANA)/complete ## rewrite alerts and dashboard in contrib/grafana from their sources
	@$(VENV)/bin/python contrib/grafana/alerts.py
	@$(GRAFANA)/bin/python contrib/grafana/dashboard.py

bench: $(STAMP) $(PEERS)/complete ## against what others use, side by side, ten minutes; ARGS=--quick tries it
	@BENCH_PEERS=$(PEERS) $(VENV)/bin/python benchmarks/peers.py $(ARGS)

lint: $(STAMP) ## style, format, types, import contracts, the lock
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports
	@$(VENV)/bin/python .ci/check_lock.py

format: $(STAMP) ## rewrite the sources as `make lint` wants them
	@$(VENV)/bin/ruff check --fix --quiet || true
	@$(VENV)/bin/ruff format

lock: ## rewrite requirements.lock after a change of pyproject.toml; ARGS=--upgrade for new releases
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && \
	$(PYTHON) -m venv "$$scratch" && \
	"$$scratch/bin/python" -m pip install -qq --disable-pip-version-check uv && \
	"$$scratch/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --extra embedded --group test --group lint --group build pyproject.toml \
		--output-file requirements.lock --custom-compile-command 'make lock' $(ARGS)

ci: ## what CI runs
	@bash .ci/run

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "wa-monitor needs Python 3.11 or newer and '$(PYTHON)' is none: use make PYTHON=/path/to/python3" >&2; \
		exit 1; }
	@echo "building the environment $(VENV) (once, about a minute)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --require-hashes -r requirements.lock
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)

$(PEERS)/complete: benchmarks/requirements.txt $(STAMP)
	@echo "building the environment $(PEERS) of what we are compared with"
	@rm -rf $(PEERS)
	@$(VENV)/bin/python -m venv $(PEERS)
	@install="$(PEERS)/bin/python -m pip install -qq --disable-pip-version-check --no-deps"; \
	if $$install -r benchmarks/requirements.txt; then touch $@; else \
		echo "not all can be installed: what is missing has a row that says so"; \
		grep '^[^#]' benchmarks/requirements.txt | xargs -n 1 $$install || true; fi

$(BROWSER)/complete: tests/page/requirements.txt $(STAMP)
	@echo "fetching what looks at the status page into $(BROWSER)"
	@rm -rf $(BROWSER)
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --target $(BROWSER) -r $<
	@touch $@

$(GRAFANA)/complete: contrib/grafana/requirements.txt $(TYPES)/package.json $(TYPES)/package-lock.json $(STAMP)
	@echo "building the environment $(GRAFANA) of the dashboard"
	@rm -rf $(GRAFANA)
	@$(VENV)/bin/python -m venv $(GRAFANA)
	@$(GRAFANA)/bin/python -m pip install -qq --disable-pip-version-check --require-hashes --no-deps \
		-r contrib/grafana/requirements.txt
	@mkdir $(GRAFANA)/types && cp $(TYPES)/package.json $(TYPES)/package-lock.json $(GRAFANA)/types
	@if command -v npm >/dev/null; then \
		npm ci --prefix $(GRAFANA)/types --ignore-scripts --no-audit --no-fund --silent; fi
	@touch $@
