"""The paper's fixed indicator (weights and biases) against the reward's, after a real GRPO run.

    mama run configs/demo.yaml --seed 0 --output_dir runs/demo-0        # and seeds 1, 2
    python -m benchmarks.reward_indicator --output reward.json --runs runs/demo-0 runs/demo-1 runs/demo-2

The SFT model of each run goes through the recipe's GRPO once more without any pruning, which leaves every
connection's mean (w g)² of the policy gradient. The *dense* model that comes out is then pruned in one shot with each
indicator: by the score alone, pruned connections dropped (redistribution none), as the paper does, and by MAMA's layer
solver with the score in place of the activation indicator, both with a uniform budget; and by MAMA with the budget
across layers from each. Measured as in the demo: perplexity of held-out text and accuracy on held-out sums.
"""

import json
import math
import os
import tempfile
from pathlib import Path
from statistics import mean, stdev

os.environ.setdefault("OMP_NUM_THREADS", "1")

from datasets import Dataset
from transformers.trainer_utils import set_seed

from benchmarks.common import parser, report
from mama_trl.compare.trial import dense_state
from mama_trl.config import default_blend
from mama_trl.demo import arithmetic
from mama_trl.demo.recipe import DataConfig, RunConfig
from mama_trl.demo.run import Run
from mama_trl.demo.stages import grpo_arguments
from mama_trl.indicators.combine import weights_and_biases
from mama_trl.indicators.recorded import recorded
from mama_trl.indicators.source import StoredScores
from mama_trl.model.targets import find_targets
from mama_trl.pruning.prune import prune
from mama_trl.training.grpo.trainer import MamaGRPOTrainer

LEVELS = (0.5, 0.7, 0.8)
INDICATORS = ("magnitude", "activation", "weights and biases", "sensitivity", "reward")


def rewarded(run: Run, folder: str):
    """The run's SFT model after its GRPO without pruning, and its statistics by name."""
    run.config.sparsity = 0.0
    run.config.grpo.update(output_dir=folder, budget="uniform")
    prompts = Dataset.from_list([{"prompt": p, "answer": a} for p, a in run.sums().train])
    set_seed(run.config.seed)
    trainer = MamaGRPOTrainer(
        run.load("sft"), [arithmetic.correct], args=grpo_arguments(run), train_dataset=prompts,
        processing_class=run.tokenizer(),
    )
    trainer.train()
    model = trainer.model.eval()
    targets = find_targets(model)
    scores = recorded(folder, model, targets)
    scores["weights and biases"] = {t.name: weights_and_biases(t.matrix, t.bias).detach() for t in targets}
    return model, targets, scores


def ways(scores: dict, sparsity: float) -> list[tuple[str, str, dict]]:
    """(how, indicator, options of `prune`)."""
    found = []
    fixed = StoredScores({"reward": scores["weights and biases"]})  # it takes the reward's place, in all else alike
    for indicator in INDICATORS:
        options = {
            "indicators": ["reward" if indicator == "weights and biases" else indicator], "budget": "uniform",
            "scores": fixed if indicator == "weights and biases" else StoredScores(scores),
        }
        found.append(("dropped", indicator, {**options, "redistribution": "none"}))
        found.append(("redistributed", indicator, options))
    blend = default_blend("gradients", sparsity)
    for name, source, budget in (
        ("weights and biases", fixed, "reward"), ("sensitivity", StoredScores(scores), "sensitivity"),
        ("reward", StoredScores(scores), "reward"),
    ):
        found.append(("budget", name, {"budget": budget, "budget_blend": blend, "scores": source}))
    return [*found, ("budget", "uniform", {"budget": "uniform"})]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--runs", nargs="+", required=True, metavar="DIR", help="folders of `mama run`")
    args = options.parse_args()
    levels = (0.5,) if args.quick else LEVELS
    measured: dict[tuple, list[dict]] = {}
    dense = []
    for folder in args.runs:
        config = json.loads((Path(folder) / "run.json").read_text())
        config["output_dir"] = folder
        run = Run(RunConfig(**{**config, "data": DataConfig(**config["data"])}))
        with tempfile.TemporaryDirectory() as output:
            model, targets, scores = rewarded(run, output)
        state, rows = dense_state(model), run.calibration()
        dense.append(run.evaluate(model))
        for level in levels:
            model.load_state_dict(state)  # indicators are relative to the dense weights
            for how, indicator, asked in ways(scores, level):
                model.load_state_dict(state)
                prune(model, rows, sparsity=level, progress=False, **asked)
                found = run.evaluate(model)
                measured.setdefault((level, how, indicator), []).append(found)
                print(folder, level, how, indicator, found, flush=True)
    rows = []
    for (level, how, indicator), found in measured.items():
        nats = [math.log(each["perplexity"]) for each in found]
        right = [each["accuracy"] for each in found]
        rows.append({
            "sparsity": level, "how": how, "indicator": indicator, "perplexity": math.exp(mean(nats)),
            "deviation": stdev(nats) if len(nats) > 1 else 0.0, "accuracy": mean(right),
            "accuracy_deviation": stdev(right) if len(right) > 1 else 0.0,
        })
    by = {(row["sparsity"], row["how"], row["indicator"]): row["accuracy"] for row in rows}
    summary = {
        f"reward_minus_fixed_accuracy_{how}": mean(
            by[level, how, "reward"] - by[level, how, "weights and biases"] for level in levels
        )
        for how in ("dropped", "redistributed", "budget")
    }
    summary["dense_accuracy"] = mean(each["accuracy"] for each in dense)
    summary["dense_perplexity"] = math.exp(mean(math.log(each["perplexity"]) for each in dense))
    report(rows, summary, args, runs=len(args.runs))


if __name__ == "__main__":
    main()
