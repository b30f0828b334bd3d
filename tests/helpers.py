"""What tests of several rooms make: a training run on a tiny model, a layer with inputs, masks."""

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from mama_trl import MamaCallback, MaskSet
from mama_trl.model.targets import find_targets


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


def layer(outputs=12, inputs=16, tokens=400, seed=0):
    """A random weight (out, in) and inputs (tokens, in) that go with one another."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator)
    samples = torch.randn(tokens, inputs, generator=generator) @ mixing
    return torch.randn(outputs, inputs, generator=generator), samples


def some_masks(model):
    """A mask for every target, of about 0.3 density."""
    generator = torch.Generator().manual_seed(0)
    return MaskSet.from_masks(
        {t.name: torch.rand(t.parameter.shape, generator=generator) > 0.7 for t in find_targets(model)}
    )
