# Everything is set up from Python 3.10 or newer, pip and the package index. Every target may be repeated.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin
RESULTS = benchmarks/results
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: setup demo test test-vllm behaviours torture check docs wheels bench bench-answer bench-gpu bench-store quality results unseen recipe \
	neighbours report ladder train trained analyses sensitivity clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml requirements-dev.txt integrations/llama-index-llms-cacheclip/pyproject.toml \
		integrations/langchain-cacheclip/pyproject.toml tools/scripts/setup_torch.py
	@test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	@$(RUN)/python tools/scripts/setup_torch.py
	@echo "installing cacheclip-rag and what it is developed with ..."
	@$(RUN)/python -m pip --disable-pip-version-check install -q -r requirements-dev.txt
	@touch $@

demo: setup  ## real documents, real questions, with and without reuse
	@$(RUN)/cacheclip pull smollm2-135m-instruct qwen2.5-coder-0.5b-instruct all-minilm-l6-v2
	@$(RUN)/python examples/demo/demo.py

test: setup  ## the whole suite; the weights it needs are SmolLM2's and MiniLM's
	@$(RUN)/cacheclip pull smollm2-135m-instruct all-minilm-l6-v2
	@$(RUN)/python -m pytest

test-vllm:  ## vllm-cacheclip with a real vLLM, in an environment of its own (3.4 GB); says so where it cannot
	@PYTHON=$(PYTHON) integrations/vllm-cacheclip/run_tests

behaviours: setup  ## try everything docs/frameworks.md lists, and write its table
	@$(RUN)/cacheclip pull smollm2-135m-instruct all-minilm-l6-v2
	@$(RUN)/python tools/scripts/behaviours.py

torture: setup  ## break the chunk store, and engines in every way, at length (an hour; ROUNDS=20000 for a night)
	@$(RUN)/cacheclip pull all-minilm-l6-v2
	@$(RUN)/python tests/torture.py --rounds $(or $(ROUNDS),200)
	@$(RUN)/python tests/torture_engine.py --forks $(or $(ROUNDS),200) --kills $(or $(ROUNDS),200)

check: setup  ## style, types, and that nothing imports upward
	@$(RUN)/ruff format --check .
	@$(RUN)/ruff check .
	@$(RUN)/mypy
	@$(RUN)/lint-imports

docs: setup  ## the documentation's site, into site/
	@NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict --quiet
	@echo "site/index.html"

DISTRIBUTIONS = . integrations/langchain-cacheclip integrations/llama-index-llms-cacheclip \
	integrations/vllm-cacheclip
wheels: setup  ## wheels and source distributions of all packages, into dist/
	@rm -rf dist
	@for folder in $(DISTRIBUTIONS); do $(RUN)/python -m build --no-isolation --outdir dist $$folder || exit 1; done

bench: setup  ## exactness, then speed with quality beside it (about forty minutes on two cores)
	@$(RUN)/python benchmarks/exact.py --model qwen2.5-coder-0.5b-instruct
	@$(RUN)/python benchmarks/speed.py --methods cacheclip
	@$(RUN)/python benchmarks/concurrency.py
	@$(RUN)/python -m cacheclip_eval $(RESULTS)/quality-1.5b.jsonl

bench-answer: setup  ## DATA=folder: whole answers, beside transformers, OpenVINO GenAI and vLLM (says first how long it takes)
	@$(RUN)/cacheclip pull qwen2.5-coder-0.5b-instruct
	@$(RUN)/python benchmarks/answer.py $(DATA) --resume

bench-gpu: setup  ## reuse on one CUDA GPU, without weights (eight minutes)
	@$(RUN)/python benchmarks/gpu.py --out $(RESULTS)/gpu.jsonl

bench-store: setup  ## what the chunk store's promises cost against plain safetensors, and with 100,000 entries
	@$(RUN)/python benchmarks/store.py

quality: setup  ## DATA=folder: the quality rows that `bench` prints (hours; resumable)
	@$(RUN)/python benchmarks/quality.py $(DATA) --out $(RESULTS)/quality-1.5b.jsonl

# All methods at one ratio; every system and set once, whatever was done before. The two sets of long passages (5,000 and
# 6,000 tokens an item) are shortened to two and four passages: with all of them a run takes some five hours more.
MET = context=prompts
COMMA = ,
PARTS = naive:$(MET) random@0.1:$(MET) epic@0.1:$(MET),prefix=system cacheblend@0.1:$(MET),prefix=system \
	cacheclip@0.1:$(MET),layers=upper fusionrag@0.1:$(MET) infoflow@0.1:$(MET) \
	"query_guided@0.1:$(MET),layers=(0.69,0.83)" "query_guided@0.1:$(MET),layers=(0.69,1.0),normalise=chunk" \
	"query_guided@0.1:$(MET),layers=(0.69,0.83),normalise=chunk,group_size=1" \
	"query_guided@0.1:$(MET),layers=(0.69,1.0),normalise=chunk,group_size=1" \
	"query_guided@0.1:$(MET),layers=all,normalise=chunk,group_size=1" \
	"query_guided@0.2:layers=(0.69,1.0),normalise=chunk,group_size=1" "query_guided@0.2:layers=(0.69,0.83)"
SETS = $(DATA)/hotpotqa_distractor $(DATA)/2wikimultihopqa $(DATA)/xquad_fusion \
	"ruler_2k=$(DATA)/ruler_niah?approx_tokens=2000" "ruler_4k=$(DATA)/ruler_niah?approx_tokens=4000" \
	"kv_retrieval_75=$(DATA)/kv_retrieval_75?passages=2" \
	"musique_cacheblend=$(DATA)/musique_cacheblend?answer_in_passages=True&passages=4"

results: setup  ## DATA=folder: every method on every set, 20 items each (hours; resumable)
	@$(RUN)/cacheclip eval $(SETS) --methods all --ratio 0.15 --items 20 \
		--out $(RESULTS)/methods-1.5b.jsonl --no-table
	@$(RUN)/cacheclip eval $(DATA)/hotpotqa_distractor --methods cachecraft prefix-cache ragcache --ratio 0.15 --items 20 \
		--out $(RESULTS)/exact-1.5b.jsonl --no-table
	@$(RUN)/python benchmarks/results.py

# Apart from the sets above: `auto` is tried on one that nothing of it was chosen on, and scales for APE and PSR are found
# there, which are then tried on sets that they were not found on.
UNSEEN = $(DATA)/nq_multidoc --no-table
unseen: setup  ## DATA=folder: `auto` on another set, and scales for APE and PSR (two hours; resumable)
	@$(RUN)/cacheclip eval $(UNSEEN) --items 12 --out $(RESULTS)/scales-1.5b.jsonl --methods naive ape psr@0.15 \
		--sweep temperature=0.8,0.9,1.0 --sweep scale=0.8,0.9,1.0
	@$(RUN)/cacheclip eval $(UNSEEN) --items 12 --out $(RESULTS)/scales-1.5b.jsonl --methods ape psr@0.15 \
		--sweep temperature=0.5,0.6,0.7 --sweep scale=1.0
	@$(RUN)/cacheclip eval $(UNSEEN) --items 20 --out $(RESULTS)/unseen-1.5b.jsonl --ratio 0.15 --methods naive \
		auto:context=prompts auto:carry=0,context=prompts auto:context=use auto@0.15:carry=0,fused=False auto@0.15:fused=False \
		cacheclip query_guided infoflow cacheblend \
		prophetkv epic naive:$(MET) auto@0.2:context=use auto@0.4:context=use
	@$(RUN)/cacheclip eval $(UNSEEN) --items 40 --out $(RESULTS)/fresh-1.5b.jsonl --ratio 0.15 --methods \
		auto:context=prompts auto:carry=0,context=prompts infoflow
	@$(RUN)/cacheclip eval $(DATA)/hotpotqa_distractor $(DATA)/2wikimultihopqa $(DATA)/xquad_fusion --items 20 --no-table \
		--out $(RESULTS)/tuned-1.5b.jsonl --methods ape:scale=1.0,temperature=0.5 psr@0.15:scale=1.0,temperature=0.9

recipe: setup  ## DATA=folder: the parts of `auto`, over the same fused chunks (hours; resumable)
	@$(RUN)/cacheclip eval $(DATA)/hotpotqa_distractor $(DATA)/2wikimultihopqa $(DATA)/xquad_fusion --methods $(PARTS) \
		--items 20 --out $(RESULTS)/recipe-1.5b.jsonl --no-table

neighbours: setup  ## DATA=folder: chunks by themselves, and fused with 2 to 15 others (hours; resumable)
	@$(RUN)/cacheclip eval $(DATA)/xquad_fusion $(DATA)/hotpotqa_distractor $(DATA)/2wikimultihopqa --items 8 \
		--out $(RESULTS)/neighbours-1.5b.jsonl --no-table --methods \
		$(foreach r,0.0 0.05 0.15,auto@$(r):carry=0$(COMMA)fused=False \
		$(foreach n,2 5 10 15,auto@$(r):context=similar$(COMMA)neighbours=$(n)) \
		$(foreach n,5 10,auto@$(r):context=use$(COMMA)neighbours=$(n)))

# The half of the questions that nothing was chosen on, and the other half, for ideas (benchmarks/halves.py).
report: setup  ## DATA=folder: seven systems on the questions kept for reporting (ten core-hours; resumable)
	@$(RUN)/python benchmarks/report.py $(DATA) --out $(RESULTS)/report-1.5b.jsonl

LADDER = auto@0.15:fused=False $(foreach q,last both,auto@0.15:fused=False$(COMMA)queries=$(q)) naive \
	$(foreach r,0.3 0.1,auto@$(r):fused=False$(COMMA)queries=both) infoflow@0.15
ladder: setup  ## DATA=folder: ideas on the questions for choosing, with the small model (an hour; resumable)
	@$(RUN)/python benchmarks/report.py $(DATA) --half choosing --model qwen2.5-coder-0.5b-instruct --items 16 \
		--sets hotpotqa_distractor nq_multidoc 2wikimultihopqa --methods $(LADDER) --out $(RESULTS)/ladder-0.5b.jsonl

TUNE = $(RUN)/cacheclip tune
ASKED = "$(DATA)/xquad_fusion?passages=4" "$(DATA)/peps_demo?passages=4" --stop-items 12
SMALL = --model smollm2-135m-instruct --batch 4
FITTED = --model qwen2.5-coder-0.5b-instruct --auxiliary smollm2-135m-instruct
HOW_turborag = blocks $(ASKED) $(SMALL) --every 25 --method turborag --steps 125
HOW_few = blocks $(ASKED) $(SMALL) --every 25 --method turborag --steps 25
HOW_blockattention = blocks $(ASKED) $(SMALL) --every 25 --method blockattention --steps 100
HOW_links = links $(ASKED) $(SMALL) --every 25 --links 5 --steps 125
HOW_packet = packet $(ASKED) $(SMALL) --every 10 --lr 3e-3 --answer 24 --steps 30
HOW_auxiliary = auxiliary $(ASKED) $(FITTED) --batch 4 --every 10 --steps 40
HOW_head = head $(ASKED) $(FITTED) --batch 8 --epochs 8
ADAPTERS = turborag few blockattention links packet auxiliary head
train: $(ADAPTERS:%=adapters/%/.finished)  ## DATA=folder: the trainings of benchmarks/results/trained.md, into adapters/ (four core-hours; resumable)
adapters/%/.finished: | setup
	@$(TUNE) $(HOW_$*) --out adapters/$*
	@touch $@

trained: setup  ## DATA=folder: what they bring, beside untrained weights (two core-hours; resumable)
	@$(RUN)/python benchmarks/trained.py $(DATA) --out $(RESULTS)/trained-135m.jsonl --items 15
	@$(RUN)/python benchmarks/trained.py $(DATA) --out $(RESULTS)/trained-0.5b.jsonl --items 20 \
		--model qwen2.5-coder-0.5b-instruct --sets xquad_held_out hotpotqa_distractor 2wikimultihopqa nq_multidoc
	@$(RUN)/python benchmarks/oracle.py "held_out=adapters/head/held-out.jsonl?passages=4" --stride 8 \
		--out $(RESULTS)/oracle-0.5b.jsonl --systems \
		random@0.15 cacheblend@0.15 infoflow@0.15 query_guided@0.15 "auto@0.15:fused=False" \
		$(foreach n,row chunk,$(foreach b,(0.0$(COMMA)0.35) (0.35$(COMMA)0.69) (0.69$(COMMA)0.83) (0.83$(COMMA)1.0),\
		"query_guided@0.15:group_size=1$(COMMA)layers=$(b)$(COMMA)normalise=$(n)")) \
		cacheclip@0.15 cacheclip@0.15:layers=upper \
		$(foreach n,auxiliary head,cacheclip@0.15:auxiliary=adapters/$(n))
	@$(RUN)/python benchmarks/trained.py --cards adapters > $(RESULTS)/trained-cards.json

analyses: setup  ## DATA=folder: what the papers leave open, measured and drawn (some twenty minutes)
	@$(RUN)/cacheclip analyse agreement $(DATA)/hotpotqa_distractor --items 8 --out docs/figures/agreement.svg \
		--auxiliary smollm2-135m-instruct --auxiliary qwen2.5-coder-0.5b-instruct
	@$(RUN)/cacheclip analyse deviation $(DATA)/hotpotqa_distractor --items 8 --out docs/figures/deviation.svg
	@$(RUN)/cacheclip analyse hits $(DATA)/xquad_fusion --items 200 --model qwen2.5-coder-0.5b-instruct \
		--out docs/figures/hits.svg
	@mv docs/figures/hits.jsonl $(RESULTS)/hits.jsonl
	@mv docs/figures/agreement.jsonl $(RESULTS)/agreement-1.5b.jsonl
	@mv docs/figures/deviation.jsonl $(RESULTS)/deviation-1.5b.jsonl
	@$(RUN)/python benchmarks/analyses.py

SMALL = --model qwen2.5-coder-0.5b-instruct --items 12 --no-table
sensitivity: setup  ## DATA=folder: what hangs on the ratio, the prefix and the number of chunks (an hour; resumable)
	@$(RUN)/cacheclip eval $(DATA)/hotpotqa_distractor $(SMALL) --out $(RESULTS)/ratio-0.5b.jsonl \
		--methods cacheblend cacheclip auto:carry=0,fused=False auto:fused=False --sweep ratio=0.05,0.1,0.15,0.2,0.25,0.3,0.35,0.4,0.45,0.5
	@$(RUN)/cacheclip eval $(DATA)/hotpotqa_distractor $(SMALL) --out $(RESULTS)/prefix-0.5b.jsonl \
		--methods naive cacheblend@0.15 cacheclip@0.15 auto@0.15:carry=0,fused=False \
		--sweep prefix=none,token,newline,generic,system
	@$(RUN)/cacheclip eval $(foreach n,2 4 6 8 10,"hotpotqa_$(n)=$(DATA)/hotpotqa_distractor?passages=$(n)") $(SMALL) \
		--out $(RESULTS)/chunks-0.5b.jsonl --methods naive cacheblend@0.15 cacheclip@0.15 auto:carry=0,context=prompts
	@$(RUN)/cacheclip analyse sweep --by ratio --rows $(RESULTS)/ratio-0.5b.jsonl --out docs/figures/ratio.svg
	@$(RUN)/cacheclip analyse sweep --by prefix --rows $(RESULTS)/prefix-0.5b.jsonl --out docs/figures/prefix.svg
	@$(RUN)/cacheclip analyse length --by chunks --rows $(RESULTS)/chunks-0.5b.jsonl --out docs/figures/chunks.svg
	@$(RUN)/python benchmarks/analyses.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache site .import_linter_cache .hypothesis dist
