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
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    from ..errors import MamaError, first_line

    options = {name: value for name, value in options.items() if value is not None}
    try:
        config = AutoConfig.from_pretrained(source, revision=options.pop("revision", None))
    except (OSError, ValueError) as error:
        raise MamaError(f"no config.json can be loaded from {source}: {first_line(error)}") from None
    if len(tokenizer) > config.vocab_size:
        raise MamaError(
            f"the tokenizer of {source} has {len(tokenizer)} tokens and its config.json a `vocab_size` of "
            f"{config.vocab_size}: make it at least as large."
        )
    set_seed(seed)
    return AutoModelForCausalLM.from_config(config, **options)


def main(config, script_args, training_args, model_args, dataset_args) -> None:
    from trl import SFTTrainer

    from ..evaluation.loading import load_tokenizer
    from ..training.callback import MamaCallback
    from . import data, training

    resume = training.check_run(script_args, training_args, model_args, needs_weights=not script_args.from_scratch)
    train_data, eval_data = data.split_data(data.load_data(script_args, dataset_args), script_args, training_args)
    options = training.model_options(training_args, model_args)
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    model = model_args.model_name_or_path
    if script_args.from_scratch:
        model = new_model(model, options, tokenizer, training_args.seed)
        training_args.model_init_kwargs = None
    trainer = SFTTrainer(
        model, args=training_args, train_dataset=train_data, eval_dataset=eval_data, processing_class=tokenizer,
        callbacks=[MamaCallback(config, stage="pretrain")],
    )
    training.train(trainer, resume, script_args.dataset_name, script_args.overwrite)


def run(argv: list[str]) -> int:
    from . import training_parser

    return training_parser.run(make_parser(), main, argv)
