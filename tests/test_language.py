"""The language model's blocks wherever they are: beside deeper towers, behind composite configs, in both stacks."""

import pytest
import torch
import transformers as T
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments

from mama_trl import MamaCallback, MamaConfig, MamaError
from mama_trl.model.blocks import find_blocks
from mama_trl.model.language import context_length, learned_positions, placeholder_ids, token_embedding
from mama_trl.training.distillation.teacher import vocabulary

from .conftest import tiny
from .peers import made
from .peers.files import share, weights_in, zeros_in

TEXT = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    vocab_size=384, max_position_embeddings=64,
)
ENCODER = {name: value for name, value in TEXT.items() if name != "num_key_value_heads"}
VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=2, image_size=16, patch_size=8
)
STACKS = dict(
    vocab_size=384, d_model=32, encoder_layers=3, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=2, max_position_embeddings=64, encoder_ffn_dim=64, decoder_ffn_dim=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
)


def llava():
    vision = T.CLIPVisionConfig(**VISION, projection_dim=32)
    return T.LlavaForConditionalGeneration(
        T.LlavaConfig(vision_config=vision, text_config=T.LlamaConfig(**TEXT), image_token_index=5)
    )


def gemma3():
    return T.Gemma3ForConditionalGeneration(T.Gemma3Config(text_config=dict(**TEXT, head_dim=16), vision_config=VISION))


def idefics3():
    return T.Idefics3ForConditionalGeneration(
        T.Idefics3Config(text_config=dict(**TEXT, model_type="llama"), vision_config=VISION)
    )


def qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    return T.Qwen2VLForConditionalGeneration(
        T.Qwen2VLConfig(
            text_config=dict(**TEXT, rope_parameters=rope), image_token_id=5, video_token_id=6,
            vision_config=dict(depth=5, embed_dim=32, hidden_size=32, num_heads=2),
        )
    )


def voxtral():
    audio = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=2)
    return T.VoxtralForConditionalGeneration(
        T.VoxtralConfig(audio_config=audio, text_config=dict(**TEXT, model_type="llama"))
    )


def t5():
    return T.T5ForConditionalGeneration(
        T.T5Config(
            vocab_size=384, d_model=32, d_kv=16, d_ff=64, num_layers=3, num_decoder_layers=2, num_heads=2,
            decoder_start_token_id=0, eos_token_id=1,
        )
    )


class Deeper(nn.Module):
    """A language model of transformers' in a plain module, beside lists of blocks that are longer."""

    def __init__(self):
        super().__init__()
        self.eyes = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(7))
        self.tower = T.SiglipVisionModel(T.SiglipVisionConfig(**VISION))
        self.speaker = tiny("llama")


def prefixes(model) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name, _ in find_blocks(model)))


@pytest.mark.parametrize("make, where", [
    (llava, ["model.language_model.layers"]),
    (gemma3, ["model.language_model.layers"]),
    (idefics3, ["model.text_model.layers"]),
    (qwen2_vl, ["model.language_model.layers"]),
    (voxtral, ["model.language_model.layers"]),
    (Deeper, ["speaker.model.layers"]),
    (t5, ["encoder.block", "decoder.block"]),
    (lambda: T.BartForConditionalGeneration(T.BartConfig(**STACKS)), ["model.encoder.layers", "model.decoder.layers"]),
    # An encoder that hears is no language model.
    (lambda: T.WhisperForConditionalGeneration(T.WhisperConfig(**STACKS)), ["model.decoder.layers"]),
    (made.classifier, ["model.layers"]),
    (lambda: T.BertForSequenceClassification(T.BertConfig(**ENCODER)), ["bert.encoder.layer"]),
    (lambda: tiny("gpt2"), ["transformer.h"]),
])
def test_blocks(make, where):
    assert prefixes(make()) == where


def test_composite_configs():
    for make in (llava, gemma3, idefics3, qwen2_vl):
        model = make()
        assert vocabulary(model.config) == 384 and context_length(model) == 64
        assert token_embedding(model).num_embeddings == 384
    assert placeholder_ids(qwen2_vl()) == [5, 6] and placeholder_ids(tiny("llama")) == []
    assert context_length(t5()) is None


def test_only_positions_that_are_learned_have_an_end():
    assert learned_positions(tiny("gpt2")) == 128 and learned_positions(tiny("opt")) == 128
    assert learned_positions(tiny("llama")) is None and learned_positions(tiny("gpt_neox")) is None


def trainer_of(model, folder, labels=None, **config):
    ids = torch.randint(10, 250, (32, 20), generator=torch.Generator().manual_seed(0)).tolist()
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=3, save_strategy="no",
        per_device_train_batch_size=4,
    )
    data = Dataset.from_dict({"input_ids": ids, "labels": labels or ids}).with_format("torch")
    mama = MamaCallback(MamaConfig(sparsity=0.5, mask_start=2, **config))
    return Trainer(model, args=args, train_dataset=data, callbacks=[mama]), mama


def check_files(trainer, mama, folder, inside: tuple[str, ...]):
    """In the saved file all matrices of the language model's blocks are half zeros, and no other matrix has any."""
    trainer.train()
    trainer.save_model(str(folder))
    matrices = [name for name, values in weights_in(folder).items() if values.ndim == 2 and "_bias" not in name]
    zeros = zeros_in(folder, matrices)
    pruned = {name: each for name, each in zeros.items() if name.startswith(inside)}
    assert share(pruned) == pytest.approx(0.5, abs=0.01) == pytest.approx(mama.sparsity, abs=1e-4)
    assert share({name: each for name, each in zeros.items() if name not in pruned}) < 1e-2


@pytest.mark.parametrize("make", [gemma3, idefics3, qwen2_vl])
def test_a_vision_language_model_is_pruned_in_its_text_part(make, tmp_path):
    trainer, mama = trainer_of(make(), tmp_path)
    before = {name: int((p == 0).sum()) for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert mama.sparsity == pytest.approx(0.5, abs=0.01) and mama.masks.verify(trainer.model) == 0
    for name, parameter in trainer.model.named_parameters():
        if name in mama.masks.names:
            assert "language_model.layers" in name or "text_model.layers" in name
            assert int((parameter == 0).sum()) > 0.2 * parameter.numel(), name
        else:
            assert int((parameter == 0).sum()) <= before[name], name


def test_an_encoder_decoder_is_pruned_in_both_stacks(tmp_path):
    trainer, mama = trainer_of(t5(), tmp_path, indicators=["magnitude"], redistribution="none", budget="uniform")
    check_files(trainer, mama, tmp_path / "saved", ("encoder.block", "decoder.block"))


def test_an_encoder_decoder_cannot_be_calibrated_which_is_said_at_once(tmp_path):
    with pytest.raises(MamaError, match="T5ForConditionalGeneration is an encoder-decoder"):
        trainer_of(t5(), tmp_path)


def test_a_classifier_in_the_trainer_keeps_its_head(tmp_path):
    model = made.classifier()
    model.config.num_labels = 1
    head = model.score.weight.detach().clone()
    trainer, mama = trainer_of(model, tmp_path, labels=[float(i % 2) for i in range(32)])
    check_files(trainer, mama, tmp_path / "saved", ("model.layers",))
    assert not torch.equal(model.score.weight, head) and bool((model.score.weight != 0).all())


# ------------------------------------------------------------------ tied heads


def test_a_tied_head_that_is_named_goes_by_the_name_it_is_stored_under(tmp_path):
    """Its checkpoints resume, the next stage takes its masks up, and the file has its zeros."""
    model = tiny("llama")  # its head is its embedding
    common = dict(
        use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=4, save_steps=2, max_steps=4, seed=0
    )
    ids = torch.randint(10, 384, (32, 20)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids}).with_format("torch")
    config = MamaConfig(sparsity=0.5, mask_start=2, target_modules=["down_proj", "lm_head"])

    def run(folder, model, config, resume=None):
        mama = MamaCallback(config)
        args = TrainingArguments(output_dir=str(folder), **common)
        trainer = Trainer(model, args=args, train_dataset=data, callbacks=[mama])
        trainer.train(resume_from_checkpoint=resume)
        return trainer, mama

    trainer, mama = run(tmp_path / "one", model, config)
    assert "model.embed_tokens.weight" in mama.masks.names and "lm_head.weight" not in mama.masks.names
    _, again = run(tmp_path / "one", tiny("llama"), config, resume=str(tmp_path / "one" / "checkpoint-2"))
    assert again.masks.digest() == mama.masks.digest()
    trainer.save_model(str(tmp_path / "one"))
    next_model = type(model).from_pretrained(tmp_path / "one")
    hold = MamaConfig(sparsity=0.5, mask_schedule="hold", target_modules=["down_proj", "lm_head"])
    later, held = run(tmp_path / "two", next_model, hold)
    later.save_model(str(tmp_path / "two"))
    assert held.masks.digest() == mama.masks.digest()
    names = ["model.embed_tokens.weight"] + [n for n in held.masks.names if "down_proj" in n]
    assert share(zeros_in(tmp_path / "two", names)) == pytest.approx(0.5, abs=0.01)


def test_two_names_of_one_parameter_are_refused(tmp_path):
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(MamaError, match="layers.1.mlp.up_proj.weight and model.layers.0.mlp.up_proj.weight are one"):
        trainer_of(model, tmp_path)
