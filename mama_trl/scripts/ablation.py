"""`mama ablation`: what each part of one-shot MAMA is worth."""

from dataclasses import dataclass

from . import common

LEVELS = "0.5,0.7,0.9"
DESCRIPTION = """Prune a model by MAMA with one part changed at a time, and compare the perplexities.

  mama ablation MODEL --calibration train.txt --text heldout.txt --seeds 0,1,2 --output ablation

Each indicator alone, each taken away from all of them together, each redistribution mode, each step of the method, and
each budget. Where a training run left statistics in MODEL/mama, the reward's indicator is set against the fixed one
(weights and biases), as an indicator and as a budget. OUTPUT gets a table as CSV and JSON and a plot."""


def make_parser():
    parser = common.CommandParser("ablation", DESCRIPTION)
    parser.add_comparison(LEVELS)
    parser.add_measuring()
    return parser


def saved_statistics(folder: str, targets) -> dict[str, dict]:
    """Indicators by name, then (out, in) by target name, that a training run left in `folder`/mama; or nothing.

    Read by parameter name, so that only what belongs to a target of this model is taken. The reward's mean square is
    given as its root. Raises `MamaError` if the file is damaged or belongs to another model.
    """
    from ..errors import MamaError
    from ..storage import RangeReader
    from ..trajectory import STEM

    reader = RangeReader.find(folder, STEM)
    if reader is None:
        return {}
    found: dict[str, dict] = {}
    shapes = {name: tuple(shape) for name, shape in reader.header["shapes"].items()}
    for indicator in reader.header["counts"]:
        for target in targets:
            stored, whole = shapes.get(target.parameter_name), tuple(target.parameter.shape)
            if stored is None:
                continue
            if stored != whole:
                raise MamaError(
                    f"{reader.where} holds shape {list(stored)} for {target.parameter_name}, whose shape is "
                    f"{list(whole)}: it belongs to another model; delete it."
                )
            values = reader.read(f"{indicator}/{target.parameter_name}", 0, target.parameter.numel()).view(whole)
            values = target.oriented(values if target.expert is None else values[target.expert]).float()
            values = values.to(target.parameter.device)
            found.setdefault(indicator, {})[target.name] = values.sqrt() if indicator == "reward" else values
    # A statistic that was never recorded is all zero and says nothing.
    return {
        name: values for name, values in found.items()
        if len(values) == len(targets) and any(bool((value != 0).any()) for value in values.values())
    }


@dataclass
class _Indicators:
    """Indicators by `names` as options of `prune`, computed from the dense weights when asked for."""

    targets: list
    scores: dict[str, dict]
    names: list[str]

    def options(self) -> dict:
        from ..oneshot.factors import factors

        importance, power = {}, 1.0
        for t in self.targets:
            own = {n: self.scores[n][t.name] for n in self.names if n in self.scores}
            importance[t.name], power = factors(t.matrix, own, {n: 1.0 for n in self.names})
        plain = any(value is None for value in importance.values())
        return {"importance": None if plain else importance, "activation_power": power}


def variants(setting, rows, batch_size: int) -> list[tuple[str, str, dict]]:
    """(part, name, options of `prune` but for the sparsity) for one draw of calibration tokens; the model is dense.

    `options["budget_scores"]` stands for a budget by these scores, which depends on the sparsity, and
    `options["indicators"]` for factors that would fill the memory if all were computed ahead.
    """
    from ..config import REDISTRIBUTIONS
    from ..oneshot.factors import weights_and_biases
    from ..oneshot.sensitivity import sensitivities
    from ..targets import find_targets

    targets = find_targets(setting.model, experts=True)
    statistics = saved_statistics(setting.source, targets)
    scores = {"sensitivity": sensitivities(setting.model, rows[: -(-len(rows) // 8)], targets, batch_size)}
    scores |= {name: values for name, values in statistics.items() if name != "sensitivity"}
    if "reward" in statistics:
        scores["weights and biases"] = {
            t.name: weights_and_biases(t.matrix, t.bias) for t in targets
        }

    def by(names) -> dict:
        # Exchanges know nothing of indicators: without them everywhere, only the indicator differs.
        return {"indicators": _Indicators(targets, scores, names), "exchanges": False}

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

    from .. import budget
    from ..oneshot.compare import summarise, trial
    from ..oneshot.sensitivity import default_blend
    from ..report.levels import write_comparison
    from .levels import parse_levels

    levels = parse_levels(args.levels)
    setting = common.Comparison(args)
    trials: list[dict] = []
    bar = None
    for seed in setting.seeds:
        rows = setting.rows(seed)
        setting.restore()
        plans = variants(setting, rows, args.batch_size)
        bar = bar or tqdm(desc="ablation", total=len(plans) * len(levels) * len(setting.seeds))
        for level in levels:
            plain = None  # MAMA as it is stands in several parts and is measured once
            for part, name, options in plans:
                options = dict(options)
                indicators = options.pop("indicators", None)
                if indicators is not None:
                    setting.restore()
                    options |= indicators.options()
                scores = options.pop("budget_scores", None)
                if scores is not None:
                    densities = budget.global_densities(list(scores.values()), level)
                    sizes = [value.numel() for value in scores.values()]
                    shares = budget.blended(sizes, densities, level, default_blend(level))
                    options["layer_sparsity"] = dict(zip(scores, shares))
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
