"""`mama pretrain`: causal language modelling on packed text, with trajectories."""

from dataclasses import dataclass, field

DESCRIPTION = """Train a language model on text and record how every weight and bias moves.

  mama pretrain --model_name_or_path MODEL --from_scratch true --dataset_name text.txt --output_dir runs/base

MODEL is a folder with config.json and a tokenizer, or a hub id; with --from_scratch its weights are drawn at random
and it needs no weight files. With --sparsity above 0 the model is pruned on the way. Masks and statistics are saved
in OUTPUT_DIR/mama, where the next command finds them."""


def make_parser():
    from trl import DatasetMixtureConfig, ModelConfig, SFTConfig

    from ..config import MamaConfig
    from . import training_parser

    @dataclass
    class PretrainArguments(training_parser.TrainingArguments):
        from_scratch: bool = field(
            default=False, metadata={"help": "Draw the weights at random; only the model's config.json is read."}
        )

    types = (MamaConfig, PretrainArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)
    parser = training_parser.make_parser(types, "pretrain", DESCRIPTION)
    parser.set_defaults(sparsity=0.0, packing=True, packing_strategy="wrapped")
    return parser


def new_model(source: str, options: dict, tokenizer, seed: int):
    """A model of `source`'s architecture with random weights. Raises `MamaError` if the tokenizer does not fit."""
    from transformers import AutoModelForCausalLM, set_seed

    from ..errors import MamaError, first_line
    from ..evaluation.loading import load_config, vocabulary_of

    options = {name: value for name, value in options.items() if value is not None}
    trust = options.pop("trust_remote_code", False)
    config = load_config(source, trust, options.pop("revision", None))
    if len(tokenizer) > (vocabulary_of(config) or len(tokenizer)):
        raise MamaError(
            f"the tokenizer of {source} has {len(tokenizer)} tokens and its config.json a `vocab_size` of "
            f"{vocabulary_of(config)}: make it at least as large."
        )
    set_seed(seed)
    try:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust, **options)
    except (ValueError, TypeError, KeyError, ImportError, RuntimeError) as error:  # also more memory than there is
        raise MamaError(f"no model can be made of the config.json of {source}: {first_line(error)}.") from error


def main(config, script_args, training_args, model_args, dataset_args) -> None:
    from trl import SFTTrainer

    from ..training.callback import MamaCallback
    from . import data, rows, training

    source, scratch = model_args.model_name_or_path, script_args.from_scratch
    with training.claimed(config, script_args, training_args, model_args, dataset_args, not scratch) as resume:
        train_data, eval_data = data.split_data(
            data.load_data(script_args, dataset_args), script_args, training_args
        )
        for part in (train_data, eval_data):
            if part is not None:
                rows.check_learnable(part, training_args.dataset_text_field)
        train_data, eval_data = (
            None if part is None else rows.check_rows(part, [training_args.dataset_text_field])
            for part in (train_data, eval_data)
        )
        options = training.model_options(training_args, model_args)
        tokenizer = training.tokenizer_of(training_args, model_args)
        model = source
        if scratch:
            model = new_model(source, options, tokenizer, training_args.seed)
            training_args.model_init_kwargs = None
        trainer = training.trainer_of(
            SFTTrainer, model, args=training_args, train_dataset=train_data, eval_dataset=eval_data,
            processing_class=tokenizer, callbacks=[MamaCallback(config, stage="pretrain")],
        )
        rows.check_positions(trainer)
        training.train(trainer, resume, script_args.dataset_name, script_args.overwrite)


def run(argv: list[str]) -> int:
    from . import training_parser

    return training_parser.run(make_parser(), main, argv)
