"""Prune while fine-tuning: `trl.SFTTrainer` with one callback.

What: a small Llama learns Python's standard library as text. From a tenth to half of the steps masks are computed along
a cubic ramp to 70 % sparsity, pruned values are redistributed, and training goes on with what is left.

How (half a minute on 2 cores, no network):

    python examples/sft_callback.py
    python examples/sft_callback.py --steps 1000 --sparsity 0.9

In your own run: bring your model, data and `SFTConfig`; the callback's line stays as it is. For a run that takes
up what this one leaves in --output_dir, load the model from there: masks and statistics lie beside it.
"""

import argparse

from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from mama_trl import MamaCallback, MamaConfig, MaskSet
from mama_trl.demo.corpus import standard_library
from mama_trl.demo.tokenizer import train_tokenizer
from mama_trl.evaluation.perplexity import perplexity
from mama_trl.evaluation.text import blocks

LENGTH = 64


def main(steps: int = 120, sparsity: float = 0.7, output_dir: str = "runs/sft_callback") -> dict:
    set_seed(0)
    corpus = standard_library(max_characters=600_000)  # your own text here
    tokenizer = train_tokenizer(corpus.train, 512)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    ))
    args = SFTConfig(
        output_dir=output_dir, max_steps=steps, per_device_train_batch_size=8, learning_rate=3e-3, max_length=LENGTH,
        packing=True, packing_strategy="wrapped", bf16=False, save_strategy="no", report_to=[], logging_steps=40,
        disable_tqdm=True,
    )
    mama = MamaCallback(MamaConfig(
        sparsity=sparsity, mask_schedule="cubic", mask_start=0.1, mask_end=0.5, mask_interval=20,
        calibration_tokens=4096,
    ))
    data = Dataset.from_dict({"text": corpus.train})
    trainer = SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[mama])
    trainer.train()
    trainer.save_model(output_dir)

    model = AutoModelForCausalLM.from_pretrained(output_dir)  # an ordinary model
    heldout = blocks(tokenizer, "\n".join(corpus.heldout), LENGTH, limit=64)
    found = {
        "perplexity": perplexity(model, heldout)["perplexity"],
        "sparsity": MaskSet.load(output_dir).sparsity(),
        "pruned connections that are not zero": MaskSet.load(output_dir).verify(model),
    }
    print(found)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--output_dir", default="runs/sft_callback")
    main(**vars(parser.parse_args()))
