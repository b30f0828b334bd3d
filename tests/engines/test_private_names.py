"""Names that other packages keep to themselves: each read in one file, and missed at once when a version renames it."""

import ast
import importlib.util
from importlib.metadata import version
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "mama_trl"
# name: (our file that reads it, where the other package's source must name it)
FOREIGN = {
    "_hp_mapping": ("engines/zero.py", "deepspeed/utils/tensor_fragment.py"),
    "_index_in_param_group": ("engines/zero.py", "deepspeed/utils/mixed_precision_linkage.py"),
    "_z3_optimizer": ("engines/zero.py", "deepspeed/runtime/zero/stage3.py"),
    "_actions": ("scripts/parser.py", "argparse.py"),
    "_experts_implementation": ("model/runner.py", "transformers/configuration_utils.py"),
    "_attn_implementation": ("pruning/structures/remove.py", "transformers/configuration_utils.py"),
    "_from_config": ("pruning/structures/smaller.py", "transformers/modeling_utils.py"),
    "_ConvNd": ("model/experts.py", "torch/nn/modules/conv.py"),
    "_foreach_norm": ("indicators/trajectory.py", "torch/optim/adamax.py torch/nn/utils/clip_grad.py"),
    "_foreach_sub_": ("indicators/trajectory.py", "torch/optim/adamw.py torch/optim/adam.py torch/optim/rprop.py"),
    "_foreach_add_": ("indicators/trajectory.py", "torch/optim/adam.py"),
    "_foreach_mul_": ("masks/bits.py", "torch/optim/adam.py"),
    "_last_loaded_step": ("training/grpo/trainer.py", "trl/trainer/grpo_trainer.py"),
    "_metrics": ("training/distillation/trainer.py", "trl/trainer/sft_trainer.py"),
    "_total_train_tokens": ("training/distillation/trainer.py demo/stages.py", "trl/trainer/sft_trainer.py"),
}
# Without an underscore, and no more public: what engines/zero.py asks of DeepSpeed's objects.
UNDOCUMENTED = {
    "deepspeed/utils/tensor_fragment.py": (
        "lp_fragment_address", "get_hp_fragment", "get_lp_grad_fragment", "optim_fragment",
    ),
    "deepspeed/runtime/zero/stage3.py": (
        "grad_position", "get_param_id", "fp32_partitioned_groups_flat", "get_local_fp32_grad_for_param",
        "parameter_offload", "swap_optimizer",
    ),
    "deepspeed/runtime/zero/parameter_offload.py": ("get_param_coordinator",),
    "deepspeed/runtime/zero/partitioned_param_coordinator.py": ("release_and_reset_all",),
    "deepspeed/runtime/zero/partition_parameters.py": ("ds_id", "ds_shape", "ds_tensor", "ds_secondary_tensor"),
}


def private_names() -> dict[str, set[str]]:
    """Attributes with an underscore that the package reads and nobody in it defines, by name: the files."""
    read: dict[str, set[str]] = {}
    ours: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                ours.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                ours.add(node.target.id)
            elif isinstance(node, ast.Assign):
                ours |= {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                own = isinstance(node.value, ast.Name) and node.value.id == "self"
                if own and isinstance(node.ctx, ast.Store) and node.attr not in FOREIGN:
                    ours.add(node.attr)
                read.setdefault(node.attr, set()).add(str(path.relative_to(PACKAGE)))
    return {name: where for name, where in read.items() if name not in ours}


def source(place: str) -> str:
    """The text of another package's file, which is not imported for it."""
    root, _, rest = place.partition("/")
    found = importlib.util.find_spec(root.removesuffix(".py"))
    path = Path(found.origin).parent / rest if rest else Path(found.origin)
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def test_every_private_name_is_read_in_one_file():
    for name, where in private_names().items():
        assert name in FOREIGN, f"{sorted(where)} read {name}, which is another package's: name it in FOREIGN here"
        assert where <= set(FOREIGN[name][0].split()), f"{name} is read in {sorted(where)}, and should be in one file"


@pytest.mark.parametrize("name", FOREIGN)
def test_the_other_package_still_has_it(name):
    ours, theirs = FOREIGN[name]
    root = theirs.partition("/")[0]
    now = version(root) if "/" in theirs else "of this Python"
    assert any(name in source(place) for place in theirs.split()), (
        f"{root} {now} does not name {name} in {theirs} any more: mama_trl/{ours} relies on it, so look up what has "
        "taken its place before this version is allowed."
    )


@pytest.mark.parametrize("place", UNDOCUMENTED)
def test_deepspeeds_objects_still_have_what_is_asked_of_them(place):
    text = source(place)
    for name in UNDOCUMENTED[place]:
        assert name in text, (
            f"deepspeed {version('deepspeed')} does not name {name} in {place} any more: mama_trl/engines/zero.py "
            "relies on it."
        )


def test_torch_still_tells_where_a_shard_lies():
    assert "def compute_local_shape_and_global_offset" in source("torch/distributed/tensor/_utils.py"), (
        f"torch {version('torch')} has moved compute_local_shape_and_global_offset, which engines/fsdp2.py reads."
    )
