"""Data and models that do not go together, at the command line: one sentence and exit code 2, before the first step."""

import json

import pytest
import transformers as T

from mama_trl.cli import main

from .conftest import tiny
from .peers import made

FLAGS = "--use_cpu true --bf16 false --report_to none --max_steps 2 --per_device_train_batch_size 2".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("rows")
    made.saved(root / "model")
    made.saved(root / "plain")
    tokenizer = made.tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(root / "plain")
    (root / "plain" / "chat_template.jinja").unlink(missing_ok=True)
    for name, model in (
        ("classifier", made.classifier()),
        ("t5", T.T5ForConditionalGeneration(T.T5Config(
            vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0,
        ))),
        ("gpt2", tiny("gpt2", len(tokenizer))),
    ):
        model.save_pretrained(root / name)
        made.tokenizer().save_pretrained(root / name)
    unsaveable = made.model()
    unsaveable.save_pretrained(root / "unsaveable")
    made.tokenizer().save_pretrained(root / "unsaveable")
    path = root / "unsaveable" / "generation_config.json"
    stored = {**json.loads(path.read_text()), "temperature": 0.3, "do_sample": False}
    stored.pop("pad_token_id")  # TRL will set it, after which transformers no longer lets the rest pass
    path.write_text(json.dumps(stored))
    rows = {
        "messages": made.rows("messages"), "chat_prompts": made.rows("chat prompts"), "text": made.rows("text"),
        "pairs": made.rows("prompt-completion"), "null": [*made.rows("text")[:3], {"text": None}],
        "null_messages": [*made.rows("messages")[:2], {"messages": None}],
        "null_content": [
            *made.rows("messages")[:2],
            {"messages": [{"role": "user", "content": "2"}, {"role": "assistant", "content": None}]},
        ],
        "lone_prompts": [{"prompt": "2 plus 2"}] * 4,
        "half_chat": [{"prompt": [{"role": "user", "content": "2 plus 2"}], "answer": "4"}] * 4,
        "null_pairs": [*made.rows("prompt-completion")[:2], {"prompt": "2 plus 2", "completion": None}],
        "long": [{"text": "1 plus 2 makes 3 " * 60}, *made.rows("text")],
        "long_prompts": [{"prompt": "1 plus 2 makes 3 " * 60, "answer": "3"}, *made.rows("prompts")],
    }
    for name, some in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return root


def refused(capsys, *argv) -> str:
    assert main([str(item) for item in argv]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "mama: " in line]
    sentence = line.partition("mama: ")[2]  # a bar may stand before it
    assert len(sentence) < 300
    return sentence


def arguments(command: str, folder, model: str, data: str, output, *more) -> list:
    teacher = ["--teacher_model_name_or_path", folder / "model"] if command == "distill" else []
    generations = ["--num_generations", 2, "--max_completion_length", 4] if command == "grpo" else []
    return [
        command, "--model_name_or_path", folder / model, "--dataset_name", folder / f"{data}.jsonl",
        "--output_dir", output, "--sparsity", "0.0", *teacher, *generations, *FLAGS, *more,
    ]


@pytest.mark.parametrize("command, model, data, said", [
    ("sft", "plain", "messages", "no chat template"),
    ("distill", "plain", "messages", "no chat template"),
    ("grpo", "plain", "chat_prompts", "no chat template"),
    ("sft", "model", "null", "column `text` is null in 1 of 4 rows (row 4)"),
    ("sft", "model", "null_messages", "column `messages` is null in 1 of 3 rows (row 3)"),
    ("sft", "model", "null_content", "column `messages` has 1 messages of 6 without content"),
    ("distill", "model", "lone_prompts", "no column `completion` or `answer`"),
    ("sft", "plain", "half_chat", "no chat template"),
    ("sft", "model", "null_pairs", "column `completion` is null"),
    ("distill", "model", "null", "column `text` is null"),
    ("pretrain", "model", "null", "column `text` is null"),
    ("sft", "classifier", "text", "LlamaForSequenceClassification"),
    ("sft", "t5", "text", "T5ForConditionalGeneration"),
    ("grpo", "classifier", "chat_prompts", "LlamaForSequenceClassification"),
    ("distill", "t5", "text", "T5ForConditionalGeneration"),
    ("pretrain", "t5", "text", "T5ForConditionalGeneration"),
    ("sft", "unsaveable", "text", "`generation_config` cannot be saved"),
    ("grpo", "unsaveable", "chat_prompts", "`generation_config` cannot be saved"),
    ("sft", "gpt2", "long", "longer than the model's 128 positions"),
    ("distill", "gpt2", "long", "longer than the model's 128 positions"),
    ("grpo", "gpt2", "long_prompts", "longer than the model's 128 positions"),
])
def test_refused(command, model, data, said, folder, tmp_path, capsys):
    more = ["--indicators", "magnitude", "--reward_funcs", "tests.test_rows.nothing"] if command == "grpo" else []
    line = refused(capsys, *arguments(command, folder, model, data, tmp_path / "out", *more))
    assert said in line
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_stream_is_checked_row_by_row(folder, tmp_path, capsys):
    more = ["--dataset_streaming", "true"]
    line = refused(capsys, *arguments("sft", folder, "model", "null", tmp_path / "out", *more))
    assert "has None as `text`, no text" in line
    assert "128 positions" in refused(capsys, *arguments("sft", folder, "gpt2", "text", tmp_path / "out", *more))


@pytest.mark.parametrize("more", [
    ["--max_length", "64"], ["--packing", "true", "--max_length", "100"],
])
def test_what_fits_the_positions_trains(folder, tmp_path, more):
    given = arguments("sft", folder, "gpt2", "long", tmp_path / "out", "--sparsity", "0.5", "--mask_start", "1", *more)
    assert main([str(item) for item in given]) == 0


def test_an_answer_to_a_message_is_a_message(folder, tmp_path):
    assert main([str(item) for item in arguments("sft", folder, "model", "half_chat", tmp_path / "out")]) == 0


def test_a_rotary_model_may_go_beyond_its_positions(folder, tmp_path):
    assert main([str(item) for item in arguments("sft", folder, "model", "long", tmp_path / "out")]) == 0


def nothing(completions, **kwargs):
    """A reward."""
    return [0.0] * len(completions)
