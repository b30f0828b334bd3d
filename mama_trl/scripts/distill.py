"""`mama distill`: the dense model teaches the pruned one."""

DESCRIPTION = """Distil a dense teacher into a pruned student.

  mama distill --model_name_or_path runs/pruned --teacher_model_name_or_path runs/dense --dataset_name text.txt \\
      --output_dir runs/distilled

The masks beside the student are kept (--mask_schedule hold); with oneshot or cubic it is pruned while it learns.
The data is as for `mama sft`. Teacher and student need the same vocabulary."""


def make_parser():
    from trl import DatasetMixtureConfig, ModelConfig

    from ..training.distillation.config import MamaDistillationConfig
    from . import training_parser

    types = (MamaDistillationConfig, training_parser.TrainingArguments, ModelConfig, DatasetMixtureConfig)
    return training_parser.make_parser(types, "distill", DESCRIPTION)


def main(training_args, script_args, model_args, dataset_args) -> None:
    from ..errors import MamaError
    from ..evaluation.loading import check_model_source
    from ..training.distillation.trainer import MamaDistillationTrainer
    from . import data, rows, training

    if not training_args.teacher_model_name_or_path:
        raise MamaError("`teacher_model_name_or_path` is missing: give the dense model's folder or hub id.")
    check_model_source(training_args.teacher_model_name_or_path, trust_remote_code=training_args.trust_remote_code)
    with training.claimed(training_args, script_args, training_args, model_args, dataset_args) as resume:
        train_data, eval_data = data.prepared(script_args, training_args, dataset_args, completions=True)
        tokenizer = training.tokenizer_of(training_args, model_args)
        if not training_args.chat_template_path:
            rows.check_template(train_data, tokenizer, model_args.model_name_or_path)
        training.model_options(training_args, model_args)
        trainer = training.trainer_of(
            MamaDistillationTrainer, model_args.model_name_or_path, args=training_args, train_dataset=train_data,
            eval_dataset=eval_data, processing_class=tokenizer,
        )
        rows.check_positions(trainer)
        training.train(trainer, resume, script_args.dataset_name, script_args.overwrite)


def run(argv: list[str]) -> int:
    from . import training_parser

    return training_parser.run(make_parser(), main, argv)
