"""Rewards that are no numbers: a run that learns nothing stops, and says so."""

from torch import Tensor

from ...errors import MamaError

_BORNE = 10  # generations in a row without any reward, once there has been one: a judge may be away for a while


class RewardCheck:
    """Looks at the rewards of each generation.

    TRL takes an advantage of 0 where a completion has no reward: with none at all, or infinite ones, every step would
    pass without a gradient, and masks by reward would not be any.
    """

    def __init__(self):
        self._borne = 1  # a run that has none to begin with has none later

    def look(self, rewards: Tensor, names: list[str]) -> None:
        """`rewards` (completions of all ranks, functions) hold NaN where a function gave NaN or None.

        Raises:
            MamaError: one is infinite, or none is a number, the same on every rank.
        """
        infinite = rewards.isinf().any(dim=0).tolist()
        if any(infinite):
            raise MamaError(
                f"the reward {names[infinite.index(True)][:80]} gave infinity, of which no advantage can be computed: "
                "return finite numbers."
            )
        if not rewards.isnan().all():
            self._borne = _BORNE
            return
        self._borne -= 1
        if self._borne == 0:
            raise MamaError(
                f"no reward of a whole generation is a number ({', '.join(names)[:80]} gave NaN or None), so that "
                "nothing is learned: return numbers, and None only where another function does."
            )
