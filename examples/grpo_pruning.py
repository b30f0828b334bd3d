"""Prune while a reward is being earned: `MamaGRPOTrainer`.

What: a small Llama learns sums of two digits by fine-tuning, then goes on with GRPO, whose reward is 1 for a right
answer. GRPO's own gradients say which matrices the reward needs; after a third of the steps half of all connections are
pruned by that, and the policy goes on earning.

How (under a minute on 2 cores, no network):

    python examples/grpo_pruning.py
    python examples/grpo_pruning.py --steps 150 --sparsity 0.7

In your own run: `GRPOTrainer` and `GRPOConfig` become `MamaGRPOTrainer` and `MamaGRPOConfig`, with a `sparsity`.
"""

import argparse

from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from mama_trl import MamaGRPOConfig, MamaGRPOTrainer
from mama_trl.demo.arithmetic import correct, demonstrations, sums
from mama_trl.demo.tokenizer import train_tokenizer


def main(
    steps: int = 45, sparsity: float = 0.5, warm_up: int = 400, output_dir: str = "runs/grpo_pruning"
) -> dict:
    set_seed(0)
    task = sums(1, 10)  # your own prompts and answers here
    tokenizer = train_tokenizer([prompt + answer for prompt, answer in task.train], 280)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    ))
    ids, labels = demonstrations(tokenizer, task.train, rows=warm_up * 8, length=48, seed=0)
    solved = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    common = dict(bf16=False, save_strategy="no", report_to=[], disable_tqdm=True)
    args = TrainingArguments(output_dir, max_steps=warm_up, learning_rate=3e-3, logging_steps=100, **common)
    Trainer(model, args=args, train_dataset=solved).train()

    args = MamaGRPOConfig(
        output_dir=output_dir, sparsity=sparsity, mask_start=0.34, max_steps=steps, per_device_train_batch_size=64,
        num_generations=8, max_completion_length=3, learning_rate=1e-4, logging_steps=1, **common,
    )
    prompts = Dataset.from_list([{"prompt": prompt, "answer": answer} for prompt, answer in task.train])
    trainer = MamaGRPOTrainer(
        model, reward_funcs=[correct], args=args, train_dataset=prompts, processing_class=tokenizer
    )
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    found = {
        "reward, first five steps": sum(rewards[:5]) / 5, "reward, last five steps": sum(rewards[-5:]) / 5,
        "sparsity": trainer.mama.sparsity, "pruned connections that are not zero": trainer.mama.masks.verify(),
    }
    print(found)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--output_dir", default="runs/grpo_pruning")
    main(**vars(parser.parse_args()))
