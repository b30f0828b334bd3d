"""A training run on a tiny model, and the check of zeros that most tests of it want."""

from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from mama_trl import MamaCallback


class ZeroCheck(TrainerCallback):
    """Counts pruned connections that are not zero right after every optimizer step and at its end."""

    def __init__(self, mama):
        self.mama, self.steps, self.violations = mama, 0, 0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.mama.masks is not None:
            self.steps += 1
            self.violations += self.mama.masks.verify(model)


def arguments(folder, **changes):
    values = dict(
        output_dir=str(folder), use_cpu=True, max_steps=8, per_device_train_batch_size=4, logging_steps=1,
        learning_rate=1e-2, report_to=[], save_strategy="no", disable_tqdm=True, seed=0,
    )
    return TrainingArguments(**{**values, **changes})


def dataset(rows):
    return Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()}).with_format("torch")


def train(model, rows, folder, config, callbacks=(), resume=None, **changes):
    mama = MamaCallback(config)
    check = ZeroCheck(mama)
    trainer = Trainer(
        model, args=arguments(folder, **changes), train_dataset=dataset(rows), eval_dataset=dataset(rows[:4]),
        callbacks=[mama, check, *callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, mama, check
