"""`mama ablation`: what each part of one-shot MAMA is worth."""

from .parser import CommandParser

LEVELS = "0.5,0.7,0.9"
DESCRIPTION = """Prune a model by MAMA with one part changed at a time, and compare the perplexities.

  mama ablation MODEL --calibration train.txt --text heldout.txt --seeds 0,1,2 --output ablation

Each indicator alone, each taken away from all of them together, each redistribution mode, each step of the method, and
each budget. Where a training run left statistics in MODEL/mama, the reward's indicator is set against the fixed one
(weights and biases), as an indicator and as a budget. OUTPUT gets a table as CSV and JSON and a plot."""


def make_parser():
    parser = CommandParser("ablation", DESCRIPTION)
    parser.add_comparison(LEVELS)
    parser.add_measuring()
    return parser


def variants(setting, targets, rows, batch_size: int) -> list[tuple[str, str, dict]]:
    """(part, name, options of `prune` but for the sparsity) for one draw of sequences; the model is dense."""
    from dataclasses import replace
    from functools import partial

    from ..config import REDISTRIBUTIONS
    from ..indicators.calibration_gradients import sensitivities
    from ..indicators.combine import weights_and_biases
    from ..indicators.recorded import recorded
    from ..indicators.source import StoredScores
    from ..solvers.methods import METHODS, solve_mama

    mama = METHODS["mama"]
    left = recorded(setting.source, setting.model, targets)
    scores = {"sensitivity": sensitivities(setting.model, rows[::8], targets, batch_size)}
    scores |= {name: values for name, values in left.items() if name != "sensitivity"}

    def by(names, found=None) -> dict:
        return {"indicators": names, "scores": found or StoredScores(scores)}

    every = ["magnitude", "activation", *scores]
    found = [("one indicator alone", name, by([name])) for name in every]
    found.append(("one of all taken away", "all", by(every)))
    found += [("one of all taken away", f"without {name}", by([n for n in every if n != name])) for name in every]
    biased = any(t.bias is not None for t in targets)
    found += [
        ("redistribution", mode, {"redistribution": mode}) for mode in REDISTRIBUTIONS if mode != "bias" or biased
    ]
    found += [
        ("steps", "mama", {}),
        ("steps", "own outputs as goals", {"method": replace(mama, solve=partial(solve_mama, goals=False))}),
        ("budget", "gradients", {}),
        ("budget", "uniform", {"budget": "uniform"}),
    ]
    if "sensitivity" in left:
        found.append(("budget", "sensitivity of the run", {"budget": "sensitivity", "scores": StoredScores(left)}))
    if "reward" in left:
        # The paper's fixed indicator takes the reward's place, in all else alike.
        fixed = StoredScores({"reward": {t.name: weights_and_biases(t.matrix, t.bias) for t in targets}})
        found += [
            ("budget", "reward", {"budget": "reward", "scores": StoredScores(left)}),
            ("budget", "weights and biases", {"budget": "reward", "scores": fixed}),
            ("fixed against reward", "weights and biases", by(["reward"], fixed)),
            ("fixed against reward", "reward", by(["reward"])),
        ]
    return found


def main(args) -> dict:
    from tqdm import tqdm

    from ..compare.comparison import Comparison
    from ..compare.tables import write_comparison
    from ..compare.trial import summarise, trial
    from ..config import RECORDED_BUDGETS, default_blend
    from ..model.targets import find_targets
    from .levels import parse_levels

    levels = parse_levels(args.levels)
    with Comparison(args, "ablation") as setting:
        targets = find_targets(setting.model, experts=True)
        trials: list[dict] = []
        bar = None
        for seed in setting.seeds:
            rows = setting.rows(seed)
            setting.restore()
            plans = variants(setting, targets, rows, args.batch_size)
            bar = bar or tqdm(desc="ablation", total=len(plans) * len(levels) * len(setting.seeds))
            for level in levels:
                plain = None  # MAMA as it is stands in several parts and is measured once
                for part, name, options in plans:
                    if options.get("budget") in RECORDED_BUDGETS:  # blended as the default is: only the scores differ
                        options = {**options, "budget_blend": default_blend("gradients", level)}
                    asked = bool(options) and options != {"redistribution": "least_squares"}
                    if asked or plain is None:
                        found = trial(
                            setting.model, setting.dense, rows, setting.heldout, args.batch_size, sparsity=level,
                            **options,
                        )
                        plain = plain if asked else found
                    trials.append({
                        "part": part, "method": name, "sparsity": level, "seed": seed, **(found if asked else plain)
                    })
                    bar.update()
        bar.close()
        parts = list(dict.fromkeys(row["part"] for row in trials))
        trials.sort(key=lambda row: parts.index(row["part"]))
        rows = summarise(trials, ("part", "method", "sparsity"), setting.reference["nats"], setting.vocabulary)
        result = {**setting.described(), "rows": rows, "trials": trials}
        write_comparison(result, setting.output, "ablation")
        print(setting.output / "ablation.png")
        return result


def run(argv: list[str]) -> int:
    main(make_parser().parse_args(argv))
    return 0
