"""Tiny models, token rows, matrices and a tokenizer, all from fixed seeds and without a file."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 128
LENGTH = 32
SPECIAL = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
SHAPE = {
    **SPECIAL, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
CHANGES = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "qwen3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_neox": {},  # attention and MLP side by side
    "gemma2": {**WINDOWS, "query_pre_attn_scalar": 8},  # norms before and after
    "mixtral": EXPERTS,
    # The first layer is dense, as in some real ones.
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [0]},
    "gpt_oss": {**EXPERTS, "intermediate_size": 32, "sliding_window": 8},  # experts stored (experts, in, out), biases
    "phi3": {},  # query, key and value in one matrix, gate and up in another
    # All experts get all tokens in one batched product.
    "llama4_text": {
        "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "moe_layers": [1],
    },
}
ONLY_SPECIAL = ("gpt2",)  # whose config has other names for the shape
WITHOUT = {"gpt_neox": ("num_key_value_heads", "head_dim"), "opt": ("num_key_value_heads", "head_dim")}


def model(architecture: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """A random model of a few ten thousand parameters."""
    shape = SPECIAL if architecture in ONLY_SPECIAL else SHAPE
    shape = {key: value for key, value in shape.items() if key not in WITHOUT.get(architecture, ())}
    config = AutoConfig.for_model(architecture, **{**shape, **CHANGES[architecture], **changes})
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)  # zeros would hide a bias that is forgotten
    return made.to(dtype)


def rows(count: int = 16, seed: int = 0, length: int = LENGTH) -> Tensor:
    """Token ids (count, length), low ones more often, as in a text."""
    drawn = torch.rand(count, length, generator=torch.Generator().manual_seed(seed))
    return (drawn**3 * (VOCAB - 2)).long() + 2


def matrix(outputs: int = 24, inputs: int = 32, tokens: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight (out, in) and inputs (tokens, in) that hang together and have a mean."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator)
    samples = torch.randn(tokens, inputs, generator=generator) @ mixing + 0.5
    return torch.randn(outputs, inputs, generator=generator), samples


def like(tensors: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Random tensors >= 0 of the same names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(value.shape, generator=generator) ** 4 for name, value in tensors.items()}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable character."""
    words = ["<pad>", "<eos>", *map(chr, range(32, 127)), "\n"]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=" "))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", padding_side="left",
        clean_up_tokenization_spaces=False,
    )
