"""`mama sft`: TRL's SFTTrainer with one callback."""

DESCRIPTION = """Fine-tune a model on demonstrations; record trajectories and prune on a schedule.

  mama sft --model_name_or_path MODEL --dataset_name data.jsonl --sparsity 0.5 --output_dir runs/sft

The data has a column `text`, `messages`, `prompt` and `completion`, or `question` and `answer`. --sparsity 0 only
records. Masks and statistics beside MODEL are taken up; the new ones are saved in OUTPUT_DIR/mama."""


def make_parser():
    from trl import DatasetMixtureConfig, ModelConfig, SFTConfig

    from ..config import MamaConfig
    from . import training_parser

    types = (MamaConfig, training_parser.TrainingArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)
    return training_parser.make_parser(types, "sft", DESCRIPTION)


def main(config, script_args, training_args, model_args, dataset_args) -> None:
    from trl import SFTTrainer

    from ..training.callback import MamaCallback
    from . import data, rows, training

    with training.claimed(config, script_args, training_args, model_args, dataset_args) as resume:
        train_data, eval_data = data.prepared(script_args, training_args, dataset_args, completions=True)
        tokenizer = training.tokenizer_of(training_args, model_args)
        if not training_args.chat_template_path:
            rows.check_template(train_data, tokenizer, model_args.model_name_or_path)
        training.model_options(training_args, model_args)
        trainer = training.trainer_of(
            SFTTrainer, model_args.model_name_or_path, args=training_args, train_dataset=train_data,
            eval_dataset=eval_data, processing_class=tokenizer,
            callbacks=[MamaCallback(config, stage="sft")],
        )
        rows.check_positions(trainer)
        training.train(trainer, resume, script_args.dataset_name, script_args.overwrite)


def run(argv: list[str]) -> int:
    from . import training_parser

    return training_parser.run(make_parser(), main, argv)
