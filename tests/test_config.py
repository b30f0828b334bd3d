"""Bad configuration is one sentence."""

import pytest

from mama_trl import MamaConfig, MamaError


def test_global_scope_with_redistribution_is_refused():
    with pytest.raises(MamaError, match="`scope` is 'global'.*set `redistribution` to none.*budget sensitivity"):
        MamaConfig(sparsity=0.5, scope="global")


@pytest.mark.parametrize(
    "field,value",
    [
        ("sparsity", 1.0), ("sparsity", -0.1), ("sparsity", True), ("pattern", "3:2"), ("scope", "layer"),
        ("indicators", ["luck"]), ("indicators", []), ("indicators", ["magnitude=-1"]), ("budget", "mine"),
        ("budget_blend", 1.5), ("mask_schedule", "linear"), ("mask_start", -1), ("mask_interval", 0),
        ("redistribution", "sum"), ("calibration_tokens", 0), ("statistics", ["luck"]), ("target_modules", ["("]),
    ],
)
def test_bad_configuration_is_said_with_field_and_value(field, value):
    with pytest.raises(MamaError, match=field):
        MamaConfig(**{field: value})
