PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.complete

# The account on the Hub that cards link to: make hub OWNER=name
OWNER ?= OWNER

# `make demo`: three to six minutes of training, in which depth is pressed later than by the recipe, as it is shorter.
# Quicker: `make demo DEMO_STEPS=20 DEMO_ROWS=64 DEMO_RESAMPLES=10`.
DEMO_TASK ?= brevo-mini
DEMO_RECIPE ?= train/recipes/$(DEMO_TASK)-online.yaml
DEMO_STEPS ?= 1600
DEMO_SETTINGS ?= evaluate_every=200 eval_rows=64 press_from=0.5 press_to=0.75
# Rows of each split that is answered, and which of them is shown.
DEMO_ROWS ?= 256
DEMO_INDEX ?= 2
# Of the bootstraps behind the intervals.
DEMO_RESAMPLES ?= 100
DEMO_RELEASED ?= checkpoints/$(DEMO_TASK)-online
# A folder for each length: no step goes on in a folder that was begun with other settings.
DEMO_OUT ?= build/demo/$(DEMO_TASK)-$(DEMO_STEPS)-steps-$(DEMO_ROWS)-rows
DEMO_RUN = $(DEMO_OUT)/just-trained

DEMO_EVALUATE = $(BIN)/python evaluate/run.py --dataset $(DEMO_OUT)/tasks --config $(DEMO_TASK) --controls False \
	--sweep_rows 0 --resamples $(DEMO_RESAMPLES)

.PHONY: setup test demo lint fuzz matrix benchmark mini report hub clean

setup: $(STAMP)

# The stamp is written last, so that an interrupted set-up is done again.
$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up .venv: some minutes, without a word of pip's"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

# A step that was stopped goes on where it was, and one that is finished is quick.
demo: export OMP_NUM_THREADS ?= 2
# No bar for the loading of weights and rows, which is done at once.
demo: export HF_HUB_DISABLE_PROGRESS_BARS = 1
demo: export HF_DATASETS_DISABLE_PROGRESS_BARS = 1
demo: $(DEMO_RELEASED) setup
	@echo "[1/5] Building the dataset: $(DEMO_OUT)/tasks"
	@$(BIN)/python datasets_scripts/build.py --out $(DEMO_OUT)/tasks --tasks $(DEMO_TASK) --rows 1000 \
		--eval_rows $(DEMO_ROWS)
	@echo "[2/5] Training a model that decides after every iteration, for $(DEMO_STEPS) steps: $(DEMO_RUN)"
	@$(BIN)/python train/pretrain.py --config $(DEMO_RECIPE) --out $(DEMO_RUN) --resume \
		--set steps=$(DEMO_STEPS) $(DEMO_SETTINGS)
	@echo "[3/5] Evaluating it, and the released $(DEMO_RELEASED)"
	@$(DEMO_EVALUATE) --model $(DEMO_RUN)/model --out $(DEMO_RUN)/evaluation
	@$(DEMO_EVALUATE) --model $(DEMO_RELEASED) --out $(DEMO_OUT)/released/evaluation
	@echo "[4/5] Putting both side by side"
	@$(BIN)/python evaluate/report.py $(DEMO_RUN)/evaluation $(DEMO_OUT)/released/evaluation --out $(DEMO_OUT)/report
	@echo "[5/5] One example, answered by the model that was just trained, and by the released one"
	@$(BIN)/python evaluate/show.py --model $(DEMO_RUN)/model $(DEMO_RELEASED) --task $(DEMO_TASK) \
		--index $(DEMO_INDEX)
	@echo
	@echo "The report is $(abspath $(DEMO_OUT))/report/report.html: open it in a browser."
	@echo "A Hub repo of your model, under build/hub: $(BIN)/python release/collect.py $(DEMO_RUN) && make hub OWNER=your-name"

$(DEMO_RELEASED):
	$(error $(DEMO_RELEASED) is missing; set DEMO_RELEASED to the folder of a trained checkpoint)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fuzz: setup
	$(BIN)/python -m pytest -q -m thorough

matrix: setup
	$(BIN)/python release/matrix.py

benchmark: setup
	$(BIN)/python benchmarks/prefill.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/tasks.py
	$(BIN)/python benchmarks/training.py

build/tasks: | setup
	$(BIN)/python datasets_scripts/build.py --out $@ --tasks mano-mini brevo-mini lano-mini --rows 20000

# Trains and evaluates all mini runs; what is finished is not done again. A run trains five to eighty minutes on one core, and
# an evaluation with controls takes up to twenty.
mini: setup build/tasks
	$(BIN)/python release/experiments.py --plan release/mini.yaml --out build/mini
	$(BIN)/python release/experiments.py --plan release/extrapolation.yaml --out build/extrapolation

report: mini
	$(BIN)/python evaluate/report.py build/mini/*/evaluation --out build/report
	$(BIN)/python evaluate/results.py build/mini build/extrapolation

hub: setup build/tasks
	$(BIN)/python release/assemble.py --out build/hub --dataset build/tasks --owner $(OWNER)

clean:
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache .hypothesis
