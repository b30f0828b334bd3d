"""Short real trainings that the tests here cut off, damage and go on with."""

from datasets import Dataset
from transformers import Trainer, TrainingArguments

from mama_trl import MamaCallback, MamaConfig

SAVING = {"save_strategy": "steps", "save_steps": 2}


def arguments(folder, **changes):
    values = dict(
        output_dir=str(folder), use_cpu=True, max_steps=6, per_device_train_batch_size=4, logging_steps=1,
        learning_rate=1e-2, report_to=[], save_strategy="no", disable_tqdm=True, seed=0,
    )
    return TrainingArguments(**{**values, **changes})


def dataset(rows):
    return Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()}).with_format("torch")


def trainer_of(model, rows, folder, config=None, callbacks=(), mama=None, **changes):
    """(trainer, callback) of a run that prunes to 0.75 at step 3, unless `config` says otherwise."""
    mama = mama or MamaCallback(config or MamaConfig(sparsity=0.75, mask_start=3))
    trainer = Trainer(
        model, args=arguments(folder, **changes), train_dataset=dataset(rows), eval_dataset=dataset(rows[:4]),
        callbacks=[mama, *callbacks],
    )
    return trainer, mama


def train(model, rows, folder, config=None, callbacks=(), resume=None, mama=None, save=False, **changes):
    """The same, trained, and with `save` the model saved in `folder`."""
    trainer, mama = trainer_of(model, rows, folder, config, callbacks, mama, **changes)
    trainer.train(resume_from_checkpoint=resume)
    if save:
        trainer.save_model(str(folder))
    return trainer, mama


def shares(text: str) -> list[float]:
    """The percentages in a sentence."""
    import re

    return [float(number) / 100 for number in re.findall(r"([\d.]+)%", text)]
