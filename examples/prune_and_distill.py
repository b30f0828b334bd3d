"""Prune a trained model in one shot, then teach it what the dense one knows: `prune` and `MamaDistillationTrainer`.

What: a small Llama learns sums; 90 % of its connections are pruned without any training, on a few thousand calibration
tokens; the dense model then teaches the sparse one for some steps, with the masks held. Prints the share of sums that
each gets right.

How (under a minute on 2 cores, no network):

    python examples/prune_and_distill.py
    python examples/prune_and_distill.py --method sparsegpt --sparsity 0.7

In your own run: the first half is your trained model. `mama prune` and `mama distill` do the same from the shell.
"""

import argparse
import copy

from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from mama_trl import MamaDistillationConfig, MamaDistillationTrainer, prune
from mama_trl.demo.arithmetic import correct, demonstrations, sums
from mama_trl.demo.tokenizer import train_tokenizer
from mama_trl.evaluation.tasks import task_accuracy


def main(
    steps: int = 100, method: str = "mama", sparsity: float = 0.9, dense_steps: int = 400,
    output_dir: str = "runs/prune_and_distill",
) -> dict:
    set_seed(0)
    task = sums(1, 10)
    tokenizer = train_tokenizer([prompt + answer for prompt, answer in task.train], 280)
    ids, labels = demonstrations(tokenizer, task.train, rows=8 * dense_steps, length=48, seed=0)
    prompts, answers = map(list, zip(*task.train))

    def accuracy(model) -> float:
        return task_accuracy(model, tokenizer, prompts, answers, correct, max_new_tokens=3)["accuracy"]

    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    dense = LlamaForCausalLM(LlamaConfig(  # your own model here
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    ))
    common = dict(bf16=False, save_strategy="no", report_to=[], logging_steps=100, disable_tqdm=True)
    args = TrainingArguments(f"{output_dir}/dense", max_steps=dense_steps, learning_rate=3e-3, **common)
    Trainer(dense, args=args, train_dataset=data).train()
    found = {"dense": accuracy(dense)}

    student = copy.deepcopy(dense)
    masks = prune(student, ids[:128], method, sparsity, progress=False)
    found["pruned"] = accuracy(student)
    student.save_pretrained(f"{output_dir}/pruned")
    masks.save(f"{output_dir}/pruned")

    student = AutoModelForCausalLM.from_pretrained(f"{output_dir}/pruned")  # the trainer takes up the masks beside it
    args = MamaDistillationConfig(
        output_dir=f"{output_dir}/distilled", sparsity=sparsity, max_steps=steps, per_device_train_batch_size=8,
        learning_rate=3e-3, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, **common,
    )
    trainer = MamaDistillationTrainer(
        student, teacher_model=dense, args=args, train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    found["distilled"] = accuracy(trainer.model)
    found["sparsity"] = trainer.mama.sparsity
    found["pruned connections that are not zero"] = trainer.mama.masks.verify()
    print(found)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--method", default="mama")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--output_dir", default="runs/prune_and_distill")
    main(**vars(parser.parse_args()))
