"""Tiny models and data of every kind that TRL's trainers take."""

import torch
from datasets import Dataset, IterableDataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from ..tiny_tokenizer import tiny_tokenizer

SHAPE = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    head_dim=8, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None,
)
# One whose assistant turns are marked, as assistant-only losses need.
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer():
    found = tiny_tokenizer()
    found.chat_template = CHAT
    return found


def model(seed: int = 0, mixture: bool = False):
    torch.manual_seed(seed)
    size = len(tiny_tokenizer())
    if mixture:
        shape = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[0])
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=size, **SHAPE, **shape, router_aux_loss_coef=0.1))
    return LlamaForCausalLM(LlamaConfig(vocab_size=size, **SHAPE))


def classifier(seed: int = 0):
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=len(tiny_tokenizer()), num_labels=1, **SHAPE))


def saved(folder, seed: int = 0, **options) -> str:
    """A folder with a model and its tokenizer."""
    model(seed, **options).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


_PAIRS = [(f"{a} plus {b}" + " and so on" * (a % 3), str(a + b)) for a in range(6) for b in range(4)]


def _turns(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def rows(kind: str) -> list[dict]:
    """Rows of a dataset: of lengths that differ, none longer than 60 tokens."""
    made = {
        "text": lambda q, a: {"text": f"{q} makes {a}"},
        "messages": lambda q, a: {"messages": _turns(q, a)},
        "conversations": lambda q, a: {
            "conversations": [{"from": "user", "value": q}, {"from": "assistant", "value": a}]
        },
        "prompt-completion": lambda q, a: {"prompt": q, "completion": f" makes {a}"},
        "chat prompt-completion": lambda q, a: {"prompt": _turns(q, a)[:1], "completion": _turns(q, a)[1:]},
        "prompts": lambda q, a: {"prompt": q, "answer": a},
        "chat prompts": lambda q, a: {"prompt": _turns(q, a)[:1], "answer": a},
        "question": lambda q, a: {"q": q, "a": a},
        "preference": lambda q, a: {"prompt": q, "chosen": f" makes {a}", "rejected": " makes none of it"},
        "chat preference": lambda q, a: {"chosen": _turns(q, a), "rejected": _turns(q, "none of it")},
        "unpaired": lambda q, a: {"prompt": q, "completion": f" makes {a}", "label": len(q) % 2 == 0},
    }
    if kind == "tokens":
        encode = tiny_tokenizer()
        return [{"input_ids": encode(f"{q} makes {a}")["input_ids"]} for q, a in _PAIRS]
    if kind == "tokens and labels":
        return [{**row, "labels": [-100] + row["input_ids"][1:]} for row in rows("tokens")]
    return [made[kind](question, answer) for question, answer in _PAIRS]


def dataset(kind: str, streaming: bool = False):
    found = rows(kind)
    return IterableDataset.from_generator(lambda: iter(found)) if streaming else Dataset.from_list(found)
