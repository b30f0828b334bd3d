"""Cases whose digests changed on purpose since before.json was written, one by one, with the reason."""

_ONE_SCORE = (
    "one rule combines indicators: a mask update in training took ‖x‖ into the score of every indicator, and its "
    "floors differed from one-shot's"
)
_OWN = "sparsity=0.6 mask_start=3 indicators={} redistribution={} statistics=sensitivity+movement+reward"

_SEQUENCES = (
    "calibrated on the sequences as they were, each of its own length and from its first position, not on their tokens "
    "joined and cut anew"
)

CHANGED: dict[str, str] = {
    **{
        case: _SEQUENCES
        for case in (
            "grpo llama mask_schedule=cubic mask_start=1 mask_end=3 mask_interval=1",
            "sft gpt2 sparsity=0.6 mask_start=3",
            "sft llama sparsity=0.6 mask_start=3",
            "sft qwen3 sparsity=0.8 mask_schedule=cubic mask_start=2 mask_end=5 mask_interval=2",
        )
    },
    **{
        f"train llama {_OWN.format(indicators, 'least_squares')}": _ONE_SCORE
        for indicators in (
            "activation+sensitivity=0.5", "curvature", "curvature+movement=0.5", "magnitude", "magnitude+sensitivity",
            "movement", "sensitivity",
        )
    },
    f"train llama {_OWN.format('activation+sensitivity=0.5', 'none')}": _ONE_SCORE,
    f"train llama {_OWN.format('movement', 'none')}":
        "movement alone keeps its sign: connections that move towards zero tied at nothing, and position decided",
    "grpo llama indicators=activation+reward=0.5 budget=uniform": _ONE_SCORE,
    "grpo llama indicators=reward": _ONE_SCORE,
    "oneshot llama mama sparsity=0.6 indicators=movement+curvature=2+activation redistribution=none":
        "where values stay, the mask is chosen by the score itself, not by |w| ‖x‖ times a quotient: one bit",
    "formulas":
        "one indicator alone is not divided by its mean, and means of several are exact for any number of ranks",
    "train llama sparsity=0.6 mask_start=3 indicators=curvature budget=uniform arguments=optim=sgd":
        "refused: SGD keeps no second moments, for which magnitude was taken with one log line",
}
