"""Recipes, flags and data that make no sense: one sentence in the first second, and nothing left behind."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml

from mama_trl.cli import main
from mama_trl.compare import comparison
from mama_trl.demo import facts, pipeline
from mama_trl.demo.recipe import DataConfig, ModelShape, RunConfig
from mama_trl.demo.run import Run
from mama_trl.evaluation import loading
from mama_trl.evaluation.text import read_text
from mama_trl.scripts import data, training

from .faults import ROOT, Reached, command_line, furnish, refusal, refused, tiny_model, unchanged


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def halted(monkeypatch):
    """Commands stop where their compute would begin."""

    def reached(*args, **kwargs):
        raise Reached

    for module in (loading, comparison):
        monkeypatch.setattr(module, "load_model", reached)
    monkeypatch.setattr(training, "trainer_of", reached)
    monkeypatch.setattr(pipeline, "_stages", reached)


# ---------------------------------------------------------------------- recipes of mama run


@pytest.fixture
def recipe(tmp_path):
    values = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    values["output_dir"] = str(tmp_path / "run")
    return values


DEMO = [
    ("sparsity", 1.5), ("sparsity", "much"), ("seed", -1), ("seed", 2**40), ("seed", "x"), ("title", ["a"]),
    ("title", None),
    ("title", "\ud800"), ("output_dir", 5), ("output_dir", ""), ("speed", 1), ("data", 5), ("data", [1]),
    ("model", "big"),
    ("pretrain", "long"), ("sft", [1]), ("grpo", 0), ("distill", "x"), ("format", "mama-run-9"),
    ("data.sequence_length", 0), ("data.sequence_length", 2.5), ("data.vocab_size", 10), ("data.characters", -5),
    ("data.characters", 2000), ("data.operands_from", -1), ("data.operands_below", 10), ("data.operands_below", 10**9),
    ("data.task_share", 1.5), ("data.task_share", float("nan")), ("data.calibration_blocks", -1),
    ("data.calibration_blocks", 0), ("data.evaluation_blocks", -3), ("data.evaluation_blocks", True),
    ("data.colour", 1),
    ("model.hidden_size", 0), ("model.hidden_size", 130), ("model.hidden_size", "wide"),
    ("model.num_hidden_layers", 10**9),
    ("model.num_attention_heads", 3), ("model.num_key_value_heads", 3), ("model.vocab_size", 5), ("model.head_dim", 3),
    ("model.hidden_act", "loud"), ("model.max_position_embeddings", 16), ("model.attention_bias", "perhaps"),
    ("model.rms_norm_eps", -1), ("model.colour", 1), ("model.rope_parameters", {"rope_type": "nope"}),
    ("pretrain.max_steps", 0), ("pretrain.max_steps", -1), ("pretrain.max_steps", None), ("sft.learning_rate", -1),
    ("sft.learning_rate", float("inf")), ("sft.learning_rate", "fast"), ("sft.output_dir", "elsewhere"),
    ("sft.optim", "x"),
    ("sft.luck", 1), ("sft.lr_scheduler_type", "x"), ("sft.per_device_train_batch_size", 0),
    ("sft.report_to", "nobody"),
    ("sft.lr_scheduler_kwargs", {"a": 1}), ("sft.optim", "adamw_bnb_8bit"), ("sft.deepspeed", "x.json"),
    ("sft.seed", 3),
    ("sft.resume_from_checkpoint", "true"), ("sft.push_to_hub", True), ("sft.eval_strategy", "steps"),
    ("sft.fp16", "x"),
    ("grpo.mask_start", float("nan")), ("grpo.mask_start", 1000), ("grpo.mask_start", -1), ("grpo.budget", "x"),
    ("grpo.num_generations", 3), ("grpo.num_generations", 1), ("grpo.sparsity", 2), ("grpo.use_vllm", True),
    ("grpo.statistics", "speed"), ("grpo.target_modules", "("), ("grpo.max_steps", 0), ("grpo.loss_type", "x"),
    ("sparsity", 0), ("grpo.sparsity", 0.5), ("grpo.sparsity", 0), ("grpo.mask_schedule", "hold"),
    ("grpo.calibration_tokens", 512), ("grpo.target_modules", "zzz"), ("grpo.exclude_modules", ".*"),
    ("grpo.indicators", "movement"),
    ("distill.target_modules", "zzz"), ("distill.sparsity", 0.95), ("distill.pattern", "2:4"),
    ("distill.pattern", "3:7"),
    ("distill.temperature", 0), ("distill.temperature", float("nan")), ("distill.cross_entropy_weight", -1),
    ("distill.mask_schedule", "x"), ("distill.teacher_model_name_or_path", "x"), ("distill.max_steps", 2.5),
]


@pytest.mark.parametrize("name, value", DEMO, ids=lambda v: str(v)[:30])
def test_a_recipe_that_makes_no_sense_leaves_nothing_behind(recipe, tmp_path, halted, capsys, name, value):
    section, _, key = name.rpartition(".")
    (recipe[section] if section else recipe)[key] = value
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True).encode("utf-8", "replace").decode())
    if value == "\ud800":
        path.write_text(json.dumps(recipe))
    with unchanged(tmp_path):
        said = refused(capsys, "run", path)
        theirs = ("lr_scheduler_kwargs", "report_to", "optim", "rope_parameters")  # in others' words
        assert section in said and (key in said or key in theirs or (key, value) == ("output_dir", ""))
        refused(capsys, "run", path, "--overwrite")


@pytest.mark.parametrize("grpo, model, sparsity, said", [
    ({"pattern": "2:4"}, {}, 0.8, "`pattern` 2:4 prunes 0.5"), ({"pattern": "3:7"}, {}, 4 / 7, "no multiple of 7"),
    ({"scope": "row"}, {"hidden_size": 16, "intermediate_size": 16}, 0.99, "use at most 0.9375"),
    ({"redistribution": "bias"}, {"attention_bias": False, "mlp_bias": False}, 0.8, "no layer to prune has one"),
])
def test_masks_that_the_model_cannot_have_are_refused_before_any_stage(
    recipe, tmp_path, halted, capsys, grpo, model, sparsity, said
):
    recipe["grpo"] = {"max_steps": 60, "mask_start": 10, "per_device_train_batch_size": 8, **grpo}
    recipe["model"].update(model)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, "sparsity": sparsity}))
    with unchanged(tmp_path):
        assert said in refused(capsys, "run", path)
    recipe["grpo"] = {**recipe["grpo"], "pattern": "2:4", "scope": "matrix", "redistribution": "none"}
    path.write_text(yaml.safe_dump({**recipe, "sparsity": 0.5}))
    with pytest.raises(Reached):
        main(["run", str(path)])


def test_the_demos_own_recipe_and_its_words_are_fine(recipe, tmp_path, halted):
    recipe["pretrain"]["learning_rate"] = "3e-3"
    recipe["data"]["characters"] = "6_000_000"
    recipe["grpo"]["target_modules"] = "mlp"
    recipe["model"]["attention_bias"] = "no"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(Reached):
        main(["run", str(path)])
    config = RunConfig.read(path)
    assert config.data.characters == 6_000_000 and config.model["attention_bias"] is False
    args = pipeline.grpo_arguments(Run(config))
    assert args.target_modules == ["mlp"] and config.pretrain["learning_rate"] == 3e-3 or args.sparsity == 0.8


def test_every_field_of_a_recipe_has_a_range_or_a_kind():
    """What a field without one would let through is found after two to six stages."""
    from mama_trl.fields import hints_of

    for cls in (DataConfig, ModelShape):
        for name, hint in hints_of(cls).items():
            assert hasattr(hint, "__metadata__") or hint is bool or "Literal" in str(hint) or "dict" in str(hint), name


def test_the_recipes_words_in_its_folder_are_those_of_run_json(recipe, tmp_path, halted):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    from mama_trl.demo.claim import claim
    from mama_trl.disk.lock import locked

    config = RunConfig.read(path)
    with locked(config.output_dir):
        claim(config, overwrite=False)
    stored = tmp_path / "run" / "run.json"
    assert RunConfig.of({k: v for k, v in json.loads(stored.read_text()).items() if k != "format"}, "it") == config


# ---------------------------------------------------------------------- flags


@pytest.mark.parametrize("command, flags, said", [
    ("prune", ["--seed", "-1"], "--seed"), ("prune", ["--seed", "1e3"], "--seed"),
    ("prune", ["--batch_size", "0"], "batch_size"),
    ("prune", ["--batch_size", "9" * 30], "batch_size"), ("prune", ["--sparsity", "inf"], "--sparsity"),
    ("prune", ["--budget_blend", "2"], "budget_blend"), ("prune", ["--target_modules", ""], "target_modules"),
    ("prune", ["--target_modules", "("], "target_modules"), ("prune", ["--target_modules", "zzz"], "target_modules"),
    ("prune", ["--pattern", "3:7"], "16 inputs, no multiple of 7"),
    ("prune", ["--sequence_length", "1"], "sequence_length"),
    ("prune", ["--scope", "row", "--sparsity", "0.99"], "one of which stays"),
    ("prune", ["--dtype", "float33"], "dtype"),
    ("prune", ["--calibration", "x" * 5000], "does not exist"), ("prune", ["--indicators", "reward=nan"], "indicators"),
    ("prune", ["--indicators", "activation", "activation"], "twice"), ("prune", ["--pattern", "heads:2"], "pattern"),
    ("sft", ["--max_length", "1"], "max_length"), ("sft", ["--resume_from_checkpoint", "."], "trainer_state.json"),
    ("sft", ["--gradient_checkpointing_kwargs", '{"foo": 1}'], "foo"), ("sft", ["--torch_compile_mode", "x"], "mode"),
    ("evaluate", ["--sequence_length", "1"], "sequence_length"), ("evaluate", ["--blocks", "0"], "blocks"),
    ("evaluate", ["--blocks", "9" * 40], "blocks"), ("evaluate", ["--text", ""], "does not exist"),
    ("levels", ["--levels", "nan"], "levels"), ("levels", ["--levels", "0.5,,0.9"], "levels"),
    ("levels", ["--seeds", "-1"], "seeds"),
    ("levels", ["--seeds", "9" * 40], "seeds"), ("levels", ["--seeds", ""], "seeds"),
    ("levels", ["--methods", ""], "methods"),
    ("levels", ["--pattern", "3:7"], "no multiple of 7"), ("levels", ["--methods", "mama,mam"], "methods"),
    ("ablation", ["--levels", "1.0"], "levels"), ("ablation", ["--seeds", "0,x"], "seeds"),
    ("run", ["--seed", "-1"], "--seed"), ("run", ["--seed", "9" * 30], "--seed"),
    ("sft", ["--mask_start", "50"], "after the run's last step (2)"), ("sft", ["--mask_start", "nan"], "mask_start"),
    ("sft", ["--mask_schedule", "cubic", "--mask_end", "50"], "after the run's last step"),
    ("sft", ["--seed", "-1"], "`seed`"),
    ("sft", ["--scope", "row", "--sparsity", "0.99"], "one of which stays"),
    ("sft", ["--pattern", "3:7"], "no multiple of 7"),
    ("sft", ["--learning_rate", "nan"], "learning_rate"), ("sft", ["--learning_rate", "-1"], "learning_rate"),
    ("sft", ["--max_steps", "0"], "max_steps"), ("sft", ["--report_to", "nobody"], "nobody"),
    ("sft", ["--optim", "x"], "optim"),
    ("sft", ["--target_modules", "zzz"], "target_modules"), ("sft", ["--model_init_kwargs", "{"], "model_init_kwargs"),
    ("sft", ["--use_liger_kernel", "true"], "liger"), ("sft", ["--optim", "adamw_bnb_8bit"], "bitsandbytes"),
    ("sft", ["--lr_scheduler_kwargs", '{"a": 1}'], "refuses"),
    ("sft", ["--accelerate_config", "/nowhere"], "accelerate_config"),
    ("sft", ["--dataset_name", "x" * 5000], "does not exist"),
    ("sft", ["--model_name_or_path", "x" * 5000], "does not exist"),
    ("sft", ["--save_steps", "0"], "save_steps"), ("sft", ["--packing_strategy", "tight"], "packing_strategy"),
    ("grpo", ["--num_generations", "3"], "divisible"), ("grpo", ["--beta", "-1"], "beta"),
    ("grpo", ["--loss_type", "x"], "loss_type"),
    ("grpo", ["--reward_funcs", "x"], "reward_funcs"), ("grpo", ["--reward_funcs", "os.nothing"], "reward_funcs"),
    ("distill", ["--temperature", "0"], "temperature"),
    ("distill", ["--cross_entropy_weight", "nan"], "cross_entropy_weight"),
], ids=lambda v: "-".join(v)[:40] if isinstance(v, list) else None)
def test_flags_that_make_no_sense(place, halted, capsys, command, flags, said):
    argv = command_line(place, command)
    with unchanged(place):
        assert said in refused(capsys, *argv, *flags)


def test_commands_without_faults_reach_their_compute(place, halted):
    for command in ("prune", "evaluate", "levels", "ablation", "pretrain", "sft", "grpo", "distill"):
        with pytest.raises(Reached), unchanged(place):
            main(command_line(place, command))


def test_accelerates_own_refusals_are_one_sentence(place, capsys, tmp_path):
    argv = command_line(place, "sft")
    for flag in ("--num_processes", "--main_process_port"):
        refused(capsys, *argv, "--accelerate_config", "ddp", flag, "x")
    for text in ("- a", "a: [", "compute_environment: 5\ndistributed_type: X\n"):
        (tmp_path / "a.yaml").write_text(text)
        refused(capsys, *argv, "--accelerate_config", tmp_path / "a.yaml")


# ---------------------------------------------------------------------- data of the training commands


def lines(*rows) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
ROWS = {
    "null": (lines({"text": None}, {"text": "a"}), "is null in 1 of 2"),
    "number": (lines({"text": 5}, {"text": 6}), "holds int64"),
    "mixed": (lines({"text": 5}, {"text": "a"}), "no text"), "list": (lines({"text": ["a"]}), "holds lists"),
    "mapping": (lines({"text": {"a": 1}}), "`text`"), "surrogate": (lines('{"text": "\\ud800"}'), "surrogate"),
    "without end": (lines("[" * 10**5), "cannot be loaded"),
    "nested": (lines('{"text": ' + "[" * 3000 + "]" * 3000 + "}"), "cannot"),
    "no JSON": (lines("{"), "cannot be loaded"),
    "nothing in it": (lines({"text": ""}, {"text": " \n"}), "nothing but empty"),
    "no such column": (lines({"body": "a"}), "no column `text`"),
    "answers": (lines({"question": "1?", "answer": 5}), "`answer`"),
    "no answer": (lines({"prompt": "a", "completion": None}, {"prompt": "b", "completion": "c"}), "is null"),
    "no messages": (lines({"messages": ["a"]}), "`messages`"),
    "half messages": (lines({"messages": [{"role": "user"}]}), "messages"),
    "scalars": (lines("5"), "cannot be loaded"), "empty": ("", "an empty file"), "blank": ("\n\n", "."),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("command", ["sft", "pretrain", "distill"])
def test_rows_that_nothing_can_be_learned_from(place, halted, capsys, tmp_path, kind, command):
    text, said = ROWS[kind]
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    argv = command_line(place, command)
    if command == "pretrain" and kind in ("answers", "no answer", "no messages", "half messages"):
        return  # packed text is all it takes
    argv[argv.index("--dataset_name") + 1] = str(path)
    with unchanged(place):
        line = refused(capsys, *argv)
    assert said in line or said == "."


@pytest.mark.parametrize("rows, said", [
    ([{"prompt": 1, "answer": "2"}], "`prompt` holds int64"),
    ([{"prompt": "a", "answer": None}] * 2, "`answer` is null"),
    ([{"prompt": None, "answer": "1"}, {"prompt": "a", "answer": "2"}], "`prompt` is null"),
    ([{"text": "a"}], "no column `prompt`"),
    ([{"prompt": ["a"], "answer": "2"}], "`prompt`"), ([{"question": ""}], "nothing but empty"),
    ([{"prompt": "a"}], "answer"),
])
def test_prompts_that_are_none(place, halted, capsys, tmp_path, rows, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(*rows))
    argv = command_line(place, "grpo")
    argv[argv.index("--dataset_name") + 1] = str(path)
    with unchanged(place):
        assert said in refused(capsys, *argv)


@pytest.mark.parametrize("rows", [
    [{"text": "a"}], [{"prompt": "a", "completion": "b"}], [{"messages": MESSAGES}], [{"question": "a", "answer": "b"}],
    [{"text": ""}, {"text": "a"}], [{"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}],
])
def test_rows_of_every_right_kind_pass(place, halted, tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(*rows))
    argv = command_line(place, "sft")
    argv[argv.index("--dataset_name") + 1] = str(path)
    with pytest.raises(Reached):
        main(argv)


@pytest.mark.parametrize("name, data", [
    ("a.parquet", b"PAR1xxxx"), ("a.csv", b"\xff\xfe\x00"), ("a.txt", b"\xff\xfe\x00\x80"), ("a.json", b"{"),
    ("a.xyz", b"\0x"),
])
def test_files_of_data_that_cannot_be_read(place, halted, capsys, tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    argv = command_line(place, "sft")
    argv[argv.index("--dataset_name") + 1] = str(tmp_path / name)
    refused(capsys, *argv)


@pytest.mark.parametrize("template", [
    "{a.__class__}", "{a[0]}", "{a:>99999999999}", "{", "}", "{}", "{0}", "{b}", "{a!r}",
])
def test_templates_hold_plain_columns_only(template):
    from datasets import Dataset

    rows = Dataset.from_dict({"a": ["x"]})
    with refusal("`prompt_template`"):
        data.with_prompts(rows, template, False, False)
    assert data.with_prompts(rows, "{a} {{b}}", False, False)[0]["prompt"] == "x {b}"


# ---------------------------------------------------------------------- texts to calibrate and measure on


@pytest.mark.parametrize("text, said", [
    (lines({"text": None}), "line 1, `text` is None"), (lines({"text": "a"}, {"text": 5}), "line 2, `text` is 5"),
    (lines({"text": ["a"]}), "line 1"), (lines({"body": "a"}), "column `text`"), (lines("5"), "column `text`"),
    (lines('{"text": "\\ud800"}'), "lone surrogate"), (lines("[" * 10**5), "line 1"), (lines("{"), "line 1"),
    (lines("null"), "line 1"),
    (lines('{"text": ' + "9" * 5000 + "}"), "line 1"), ("", "holds no text"), (lines({"text": " "}), "holds no text"),
])
def test_texts_in_json_lines(tmp_path, text, said):
    path = tmp_path / "text.jsonl"
    path.write_text(text)
    with refusal(said):
        read_text(path)


def test_separators_within_a_text_end_no_line(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "one\u2028two\x0bthree"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_text(path) == "one\u2028two\x0bthree"


def test_a_text_with_tokens_that_the_model_does_not_know(tmp_path, capsys):
    place = furnish(tmp_path)
    tiny_model(place / "model", vocab_size=290)  # the tokenizer's special tokens end there; a text may have all
    with unchanged(place):
        assert "vocab_size" in refused(capsys, *command_line(place, "evaluate"))


def test_a_run_that_keeps_no_sampled_connection_has_curves(monkeypatch):
    """At 0.9999 of a small model the report would come to nothing, after all the stages."""
    history = [{"stage": "sft", "step": 1, "values": [0.5, 1.0]}]
    monkeypatch.setattr(facts, "read_history", lambda folder: history)
    monkeypatch.setattr(facts, "take_sample", lambda masks: torch.zeros(2, dtype=torch.bool))
    curves = facts.trajectory_curves("", SimpleNamespace(names=[]))
    assert curves["kept"] == curves["kept_p90"] == [0.0] and curves["pruned"] == [0.75]
