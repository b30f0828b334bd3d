"""Calibration on sequences as they were: what is captured of a batch, and that grams are over real tokens alone."""

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM, Trainer, TrainingArguments
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer

from mama_trl import MamaCallback, MamaConfig, MamaError, prune
from mama_trl.calibration.blockwise import blockwise
from mama_trl.calibration.progress import Progress
from mama_trl.calibration.stagewise import stagewise
from mama_trl.masks.tensors import write_tensors
from mama_trl.model.sequences import batches, documents, spread_evenly, tokens_in
from mama_trl.model.targets import find_targets
from mama_trl.training.inputs import InputCapture

from .peers import made
from .test_language import llava

COMMON = dict(
    use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no", max_steps=3, seed=0,
    per_device_train_batch_size=4, gradient_checkpointing=False,
)


def lists(found) -> list[list[int]]:
    return [row.tolist() for row in found]


def test_documents_of_padded_packed_and_long_rows():
    ids = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 0, 0], [4, 0, 0, 0, 0]])
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    # Padding on either side goes; a single token predicts nothing.
    assert lists(documents(ids, real)) == [[5, 6, 7], [1, 2, 3]]
    assert lists(documents(ids[:2], real[:2].bool(), context=2)) == [[5, 6], [1, 2]]
    packed = torch.arange(10).view(1, -1)
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 0, 0]])  # the end is padded to a multiple
    assert lists(documents(packed, positions=positions)) == [[0, 1, 2], [4, 5, 6, 7]]
    assert lists(documents(packed, bounds=torch.tensor([0, 4, 10]))) == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9]]
    assert lists(documents(packed, positions=torch.arange(10).view(1, -1))) == [list(range(10))]
    # Positions that jump over padding within a row are no bound.
    assert lists(documents(ids[:1], torch.tensor([[1, 1, 0, 1, 1]]), torch.arange(5).view(1, -1))) == [[0, 0, 6, 7]]
    assert lists(documents(torch.tensor([[9, 9, 1, 2, 9]]), without=[9])) == [[1, 2]]
    assert lists(documents(torch.tensor([[1, 2], [3, 4]]), positions=torch.tensor([[0, 1]]))) == [[1, 2], [3, 4]]


def test_batches_hold_one_length_each():
    rows = [torch.arange(n) for n in (3, 5, 3, 2, 5, 3)]
    found = batches(rows, 2, torch.device("cpu"))
    assert [tuple(batch.shape) for batch in found] == [(2, 5), (2, 3), (1, 3), (1, 2)]
    assert tokens_in(rows) == 21 and sum(batch.numel() for batch in found) == 21
    assert [len(row) for row in spread_evenly(rows, 3)] == [3, 3, 5]
    whole = torch.arange(12).view(3, 4)
    assert [len(batch) for batch in batches(whole, 2, torch.device("cpu"))] == [2, 1]


@pytest.mark.parametrize("walk", [blockwise, stagewise])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe", "gemma3"])
def test_grams_over_ragged_sequences_are_the_sum_over_each_alone(make_model, rows, walk, architecture):
    model = make_model(architecture).eval()
    targets = find_targets(model)
    some = [rows[i][: 5 + 7 * (i % 4)] for i in range(8)]

    def grams(sequences):
        found = {}
        for measured in walk(model, sequences, targets, Progress("test", shown=False)):
            found.update({name: (gram.gram.clone(), gram.tokens) for name, gram in measured.grams.items()})
        return found

    together, alone = grams(some), [grams([row]) for row in some]
    for name, (gram, tokens) in together.items():
        assert tokens == tokens_in(some)
        expected = sum(each[name][0] for each in alone)
        assert torch.allclose(gram, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())), name


def test_one_shot_pruning_takes_sequences_of_any_lengths(make_model, rows):
    some = [rows[i][: 4 + i % 20] for i in range(24)]
    for method in ("mama", "sparsegpt", "wanda"):
        model = make_model("llama")
        assert prune(model, some, method, 0.6, progress=False).verify(model) == 0
    equal = [prune(make_model("llama"), form, "mama", 0.6, progress=False) for form in (rows[:8], list(rows[:8]))]
    assert equal[0].digest() == equal[1].digest()
    for wrong in (rows[:4].float(), rows[0], [], [rows[:2]], "text", rows[:0], rows[:, :1]):
        with pytest.raises(MamaError, match="`calibration` (is|has)"):
            prune(make_model("llama"), wrong, "mama", 0.6, progress=False)
        with pytest.raises(MamaError, match="`calibration` (is|has)"):
            MamaCallback(MamaConfig(), calibration=wrong)


def test_calibration_that_the_model_cannot_read_is_refused_before_anything_runs(make_model, tmp_path):
    long, unknown = torch.randint(0, 300, (4, 200)), torch.tensor([[5, 6, 384]])
    for calibration, said in ((long, "200 tokens, more than the model's 128"), ([unknown[0]], "token 384, and .* 384")):
        with pytest.raises(MamaError, match=said):
            prune(make_model("gpt2"), calibration, "wanda", 0.5, progress=False)
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
        with pytest.raises(MamaError, match=said):
            Trainer(make_model("gpt2"), args, callbacks=[MamaCallback(MamaConfig(), calibration=calibration)])
    assert prune(make_model("llama"), long, "wanda", 0.5, progress=False).sparsity() == pytest.approx(0.5, abs=0.01)


# ------------------------------------------------------------------ what is captured


def captured(model, forward, tokens: int = 1000) -> list[list[int]]:
    capture = InputCapture(model.train(), tokens)
    capture.start()
    forward(model)
    found = lists(capture.sequences())
    capture.stop()
    forward(model)  # it looks no longer
    assert lists(capture.sequences()) == found
    return found


IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


def test_only_passes_with_gradients_in_training_are_captured(make_model):
    model = make_model("llama")

    def passes(model):
        model(input_ids=IDS, attention_mask=MASK)
        with torch.no_grad():
            model(input_ids=IDS + 20)
        model.eval()(input_ids=IDS + 40)
        model.train().generate(input_ids=IDS + 60, max_new_tokens=2, do_sample=False)

    assert captured(model, passes) == [[5, 6, 7, 8], [9, 10, 11]]


@pytest.mark.parametrize("forward", [
    lambda model: model(IDS, MASK),
    lambda model: model(IDS, attention_mask=MASK),
    lambda model: model.model(input_ids=IDS, attention_mask=MASK),
    lambda model: torch.compile(model, backend="eager")(input_ids=IDS, attention_mask=MASK),
], ids=["positional", "keyword", "backbone", "compiled"])
def test_however_the_model_is_called(make_model, forward):
    found = captured(make_model("llama"), forward)
    assert found[0] == [5, 6, 7, 8] and found[1][:3] == [9, 10, 11]


def test_a_call_that_fails_leaves_nothing_for_the_next(make_model):
    def passes(model):
        with pytest.raises(Exception):
            model(input_ids=None, inputs_embeds=torch.zeros(2, 4, 7), attention_mask=torch.zeros(2, 4))
        model(input_ids=IDS)

    assert captured(make_model("llama"), passes) == [[5, 6, 7, 8], [9, 10, 11, 0]]


def test_the_newest_whole_sequences_up_to_the_asked_number_of_tokens(make_model):
    def passes(model):
        for step in range(6):
            model(input_ids=IDS + 10 * step, attention_mask=MASK)

    assert captured(make_model("llama"), passes, 12) == [[49, 50, 51], [55, 56, 57, 58], [59, 60, 61]]
    assert captured(make_model("llama"), passes, 2) == [[59, 60]]


def test_captured_sequences_are_saved_and_read_again(make_model, tmp_path):
    model = make_model("llama").train()
    capture = InputCapture(model, 1000)
    capture.start()
    model(input_ids=IDS, attention_mask=MASK)
    capture.save(tmp_path)
    again = InputCapture(model, 1000)
    again.load(tmp_path)
    assert lists(again.sequences()) == [[5, 6, 7, 8], [9, 10, 11]]


def seen_in(trainer, mama) -> list[list[int]]:
    trainer.train()
    assert mama.sparsity == pytest.approx(0.6, abs=0.01)
    return lists(mama.run.inputs.sequences())


@pytest.mark.parametrize("architecture", [LlamaForCausalLM, GPT2LMHeadModel])
@pytest.mark.parametrize("options", [
    dict(packing=True, max_length=100), dict(packing=True, packing_strategy="bfd_split", max_length=20),
    dict(padding_free=True, max_length=None, pad_to_multiple_of=16), dict(max_length=64),
], ids=["packed", "split", "padding-free", "padded"])
def test_sft_documents_are_captured_whole_and_apart(make_model, architecture, options, tmp_path):
    """Learned positions have an end: a flattened row of several documents would run over it."""
    name = "gpt2" if architecture is GPT2LMHeadModel else "llama"
    tokenizer = made.tokenizer()
    mama = MamaCallback(MamaConfig(sparsity=0.6, mask_start=2))
    trainer = SFTTrainer(
        make_model(name, len(tokenizer)),
        args=SFTConfig(output_dir=str(tmp_path), num_train_epochs=3, **options, **COMMON),
        train_dataset=made.dataset("text"), processing_class=tokenizer, callbacks=[mama],
    )
    length = options.get("max_length") if "split" in str(options) else None
    wanted = set()
    for row in made.rows("text"):
        ids = tokenizer(row["text"] + tokenizer.eos_token)["input_ids"]
        wanted |= {tuple(ids[i : i + (length or len(ids))]) for i in range(0, len(ids), length or len(ids))}
    found = seen_in(trainer, mama)
    assert len(found) >= 6 and all(tuple(row) in wanted for row in found)


def test_trls_own_distillation_is_captured(tmp_path):
    """Its forward goes through another module's, with the model as an argument."""
    mama = MamaCallback(MamaConfig(sparsity=0.6, mask_start=2))
    trainer = DistillationTrainer(
        made.model(), made.model(1), DistillationConfig(output_dir=str(tmp_path), max_completion_length=6, **COMMON),
        made.dataset("prompts"), processing_class=made.tokenizer(), callbacks=[mama],
    )
    encode = made.tokenizer()
    prompts = [encode(row["prompt"])["input_ids"] for row in made.rows("prompts")]
    found = seen_in(trainer, mama)
    assert found and all(any(row[: len(prompt)] == prompt for prompt in prompts) for row in found)


def test_placeholders_of_images_are_left_out(tmp_path):
    ids = torch.randint(10, 250, (16, 20), generator=torch.Generator().manual_seed(0))
    ids[:, 3:7] = 5  # the four patches of an image
    pixels = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row, "pixel_values": image} for row, image in zip(ids, pixels)]
    mama = MamaCallback(MamaConfig(sparsity=0.6, mask_start=2))
    options = {key: value for key, value in COMMON.items() if key != "gradient_checkpointing"}
    args = TrainingArguments(output_dir=str(tmp_path), **options)
    found = seen_in(Trainer(llava(), args, train_dataset=data, callbacks=[mama]), mama)
    assert len(found) == 8 and all(len(row) == 16 and 5 not in row for row in found)


class Block(nn.Module):
    def __init__(self, width: int, outside: bool):
        super().__init__()
        self.up, self.down, self.outside = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), outside

    def forward(self, x, scale=1.0):
        inner = nn.functional.linear(x, self.up.weight, self.up.bias) if self.outside else self.up(x)
        return x + self.down(torch.relu(inner)) * scale


class Plain(nn.Module):
    """A model of nobody's: no config, other names, and a forward that wants labels."""

    def __init__(self, outside: bool = False, named: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(64, 16)
        self.stack = nn.ModuleList(Block(16, outside) for _ in range(3))
        self.out, self.named = nn.Linear(16, 64), named

    def forward(self, input_ids, labels):
        x = self.table(input_ids)
        for block in self.stack:
            x = block(x=x, scale=0.5) if self.named else block(x, 0.5)
        logits = self.out(x)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


class Torchs(nn.Module):
    """PyTorch's own encoder layers, one of whose matrices is never called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(64, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder, self.out = nn.TransformerEncoder(layer, 2), nn.Linear(16, 64)

    def forward(self, ids, labels=None):
        logits = self.out(self.encoder(self.table(ids)))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits


def trained(model, folder, columns=("input_ids", "labels"), **config):
    ids = torch.randint(0, 64, (32, 20), generator=torch.Generator().manual_seed(0)).tolist()
    mama = MamaCallback(MamaConfig(sparsity=0.6, mask_start=2, **config))
    options = {key: value for key, value in COMMON.items() if key != "gradient_checkpointing"}
    trainer = Trainer(
        model, args=TrainingArguments(output_dir=str(folder), label_names=["labels"], **options),
        train_dataset=Dataset.from_dict({name: ids for name in columns}).with_format("torch"), callbacks=[mama],
    )
    trainer.train()
    assert mama.sparsity == pytest.approx(0.6, abs=0.01) and mama.masks.verify(model) == 0
    return mama


@pytest.mark.parametrize("named", [False, True])
def test_a_plain_module_is_calibrated(tmp_path, named, caplog):
    mama = trained(Plain(named=named), tmp_path)
    assert len(mama.run.inputs.sequences()) == 8
    assert not [record for record in caplog.records if "matrices" in record.getMessage()]


def test_weights_that_are_used_outside_of_their_modules_are_said(tmp_path, caplog):
    trained(Plain(outside=True), tmp_path)
    (said,) = [record.getMessage() for record in caplog.records if "matrices" in record.getMessage()]
    assert "3 of 6 matrices are never called as modules" in said and "stack.0.up.weight" in said
    assert "more calibration tokens" not in said


def test_pytorchs_own_layers(tmp_path, caplog):
    trained(Torchs(), tmp_path, ("ids", "labels"))
    (said,) = [record.getMessage() for record in caplog.records if "matrices" in record.getMessage()]
    assert "2 of 6 matrices are never called" in said and "out_proj" in said


def test_a_forward_that_wants_more_is_refused_in_one_sentence(tmp_path):
    class Wanting(Plain):
        def forward(self, input_ids, labels, images):
            return super().forward(input_ids, labels)

    with pytest.raises(MamaError, match="Wanting.forward wants images"):
        trained(Wanting(), tmp_path, ("input_ids", "labels", "images"))
    trained(
        Wanting(), tmp_path, ("input_ids", "labels", "images"), indicators=["magnitude"], redistribution="none"
    )


def test_the_state_of_an_earlier_version_is_read(make_model, tmp_path):
    tensors = {"tokens": torch.arange(10), "length": torch.tensor(4)}
    write_tensors(tmp_path / "mama" / "inputs.safetensors", tensors, {"format": "mama-inputs-2"})
    capture = InputCapture(make_model("llama"), 100)
    capture.load(tmp_path)
    assert lists(capture.sequences()) == [[0, 1, 2, 3], [4, 5, 6, 7]]
