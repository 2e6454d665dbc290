.PHONY: help setup book notebooks labs test nbval lint lock clean
unexport PYTHONHOME PYTHONPATH

# The first Python on the path that fits, or the one named by `make PYTHON=/path/to/python3.12 book`.
FITS = import sys; (3, 11) <= sys.version_info[:2] <= (3, 12) or sys.exit("This needs Python 3.11 or 3.12, not %s: \
make PYTHON=/path/to/python3.12" % sys.version.split()[0])
PYTHON ?= $(or $(shell for p in python3 python3.12 python3.11; do \
  $$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done),python3)
RUN = .venv/bin/python

help:
	@echo "make book       re-run every notebook, compare with what is committed, build the book"
	@echo "make labs       student copies, solutions and graders of the labs"
	@echo "make test       run the tests but those of endurance, which .ci/run adds"
	@echo "make nbval      run the notebooks under nbval; make book compares the same cells"
	@echo "make notebooks  re-run every notebook and keep the new outputs"
	@echo "make lint       ruff"
	@echo "make lock       resolve requirements.lock and environment.yml anew"
	@echo "make clean      remove what make built"

setup:
	@python="$(PYTHON)"; "$$python" -c '$(FITS)' && "$$python" .ci/venv.py $(if $(filter command environment,$(origin PYTHON)),--of-this)

book: setup
	@$(RUN) book/rebuild.py

notebooks: setup
	@$(RUN) book/rebuild.py notebooks

labs: setup
	@$(RUN) book/teaching/build.py

test: setup
	@$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not endurance"

nbval: setup
	@$(RUN) book/rebuild.py nbval

lint: setup
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check

lock: setup
	@$(RUN) -m uv pip compile pyproject.toml --upgrade --universal --all-extras --fork-strategy fewest \
	  --generate-hashes --no-emit-index-url --custom-compile-command "make lock" --quiet --output-file requirements.lock
	@$(RUN) .ci/environment.py > environment.yml

clean:
	@rm -rf .venv book/_build build dist .pytest_cache .hypothesis .ruff_cache
