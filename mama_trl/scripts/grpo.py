"""`mama grpo`: GRPO whose backward pass says which connections earn the reward."""

import importlib
import os
import sys
from dataclasses import dataclass, field

DESCRIPTION = """Reinforcement learning with a checkable reward; prune by what the reward asks for.

  mama grpo --model_name_or_path MODEL --dataset_name data.jsonl --sparsity 0.5 --output_dir runs/grpo

The data has a column `prompt` (or `question`) and, for the reward `accuracy`, `answer`; of an answer such as
"3 + 4 = 7 #### 7" the part after #### counts. Another reward is a dotted import path such as my_rewards.length."""


def make_parser():
    from trl import DatasetMixtureConfig, ModelConfig

    from ..training.grpo.config import MamaGRPOConfig
    from . import training_parser

    @dataclass
    class GRPOArguments(training_parser.TrainingArguments):
        reward_funcs: list[str] = field(
            default_factory=lambda: ["accuracy"],
            metadata={"help": "Rewards: `accuracy` (the last number equals the answer), or dotted import paths."},
        )

    types = (MamaGRPOConfig, GRPOArguments, ModelConfig, DatasetMixtureConfig)
    return training_parser.make_parser(types, "grpo", DESCRIPTION)


def reward_functions(names: list[str]) -> list:
    """The functions behind the names. Raises `MamaError` for a name that leads nowhere."""
    from ..errors import MamaError, first_line, shown
    from ..evaluation.rewards import accuracy

    found = []
    for name in names:
        if name == "accuracy":
            found.append(accuracy)
            continue
        module, _, attribute = name.rpartition(".")
        if not module:
            raise MamaError(f"`reward_funcs` has {shown(name)}: use accuracy, or a dotted path such as rewards.length.")
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            reward = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # whatever a user's module does when it is imported
            said = f"{type(error).__name__}: {first_line(error)}"
            raise MamaError(f"`reward_funcs` has {shown(name)}, which cannot be imported: {said}.") from error
        if not callable(reward):
            raise MamaError(f"`reward_funcs` has {shown(name)}, which is no function but {shown(reward)}.")
        found.append(reward)
    return found


def main(training_args, script_args, model_args, dataset_args) -> None:
    from ..errors import MamaError
    from ..training.grpo.trainer import MamaGRPOTrainer
    from . import data, rows, training

    with training.claimed(training_args, script_args, training_args, model_args, dataset_args) as resume:
        rewards = reward_functions(script_args.reward_funcs)
        train_data, eval_data = data.prepared(script_args, training_args, dataset_args, completions=False)
        columns = list(train_data.column_names or ["prompt", "answer"])
        for column, needed in (("prompt", True), ("answer", "accuracy" in script_args.reward_funcs)):
            if needed and column not in columns:
                raise MamaError(f"the dataset has no column `{column}`, only {', '.join(columns)}: rename one.")
            if needed:
                rows.check_filled(train_data, column)
        tokenizer = training.tokenizer_of(training_args, model_args)
        if script_args.chat and tokenizer.chat_template is None:
            raise MamaError(f"`chat` is set, but {model_args.model_name_or_path} has no chat template: leave it out.")
        rows.check_template(train_data, tokenizer, model_args.model_name_or_path)
        training.model_options(training_args, model_args)
        trainer = training.trainer_of(
            MamaGRPOTrainer, model_args.model_name_or_path, rewards, args=training_args, train_dataset=train_data,
            eval_dataset=eval_data, processing_class=tokenizer,
        )
        rows.check_positions(trainer)
        training.train(trainer, resume, script_args.dataset_name, script_args.overwrite)


def run(argv: list[str]) -> int:
    from . import training_parser

    return training_parser.run(make_parser(), main, argv)
