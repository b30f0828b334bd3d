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
    """(part, name, options of `prune` but for the sparsity) for one draw of calibration tokens; the model is dense.

    `options["budget_scores"]` stands for a budget by these scores, which depends on the sparsity, and
    `options["indicators"]` for a function that gives further options, to be called when the model is dense.
    """
    from ..config import REDISTRIBUTIONS
    from ..indicators.calibration_gradients import sensitivities
    from ..indicators.combine import weights_and_biases
    from ..indicators.recorded import indicator_options, recorded

    statistics = recorded(setting.source, setting.model, targets)
    scores = {"sensitivity": sensitivities(setting.model, rows[::8], targets, batch_size)}
    scores |= {name: values for name, values in statistics.items() if name != "sensitivity"}
    if "reward" in statistics:
        scores["weights and biases"] = {
            t.name: weights_and_biases(t.matrix, t.bias) for t in targets
        }

    def by(names) -> dict:
        # Exchanges know nothing of indicators: without them everywhere, only the indicator differs.
        # Computed when asked for: factors of all variants at once would fill the memory.
        weights = {name: 1.0 for name in names}
        return {"indicators": lambda: indicator_options(targets, scores, weights), "exchanges": False}

    every = ["magnitude", "activation", *(n for n in scores if n != "weights and biases")]
    found = [("one indicator alone", name, by([name])) for name in every]
    found.append(("one of all taken away", "all", by(every)))
    found += [("one of all taken away", f"without {name}", by([n for n in every if n != name])) for name in every]
    biased = any(t.bias is not None for t in targets)
    found += [
        ("redistribution", mode, {"redistribution": mode})
        for mode in REDISTRIBUTIONS if mode != "bias" or biased
    ]
    found += [
        ("steps", "mama", {}),
        ("steps", "without exchanges", {"exchanges": False}),
        ("steps", "own outputs as goals", {"dense_goals": False}),
        ("budget", "sensitivity", {}),
        ("budget", "uniform", {"budget": "uniform"}),
    ]
    if "sensitivity" in statistics:
        found.append(("budget", "sensitivity of the run", {"budget_scores": statistics["sensitivity"]}))
    if "reward" in statistics:
        found += [
            ("budget", "reward", {"budget_scores": statistics["reward"]}),
            ("budget", "weights and biases", {"budget_scores": scores["weights and biases"]}),
            ("fixed against reward", "weights and biases", by(["weights and biases"])),
            ("fixed against reward", "reward", by(["reward"])),
        ]
    return found


def main(args) -> dict:
    from tqdm import tqdm

    from ..compare.comparison import Comparison
    from ..compare.tables import write_comparison
    from ..compare.trial import summarise, trial
    from ..model.targets import find_targets
    from ..selection.allocation import default_blend, shared_by
    from .levels import parse_levels

    levels = parse_levels(args.levels)
    setting = Comparison(args)
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
                options = dict(options)
                indicators = options.pop("indicators", None)
                if indicators is not None:
                    setting.restore()
                    options |= indicators()
                scores = options.pop("budget_scores", None)
                if scores is not None:
                    options["layer_sparsity"] = shared_by(scores, targets, level, default_blend(level))
                asked = bool(options) and options != {"redistribution": "least_squares"}
                if asked or plain is None:
                    found = trial(
                        setting.model, setting.dense, rows, setting.heldout, args.batch_size, sparsity=level, **options
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
