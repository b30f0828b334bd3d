"""What a trainer that stands in for another owes it: loading, configs, defaults, tags, refusals before it runs."""

import json

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from mama_trl import (
    MamaCallback,
    MamaConfig,
    MamaDistillationConfig,
    MamaDistillationTrainer,
    MamaError,
    MamaGRPOConfig,
    MamaGRPOTrainer,
    prune,
)

from .peers import made
from .peers.files import share, weights_in

QUIET = dict(use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, per_device_train_batch_size=4, max_steps=2)


def rewards(completions, **kwargs):
    return [float(len(str(each)) % 3) for each in completions]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`dense` in bf16 and fp32, `teacher`, and `pruned` at 0.5 with its masks."""
    root = tmp_path_factory.mktemp("models")
    made.saved(root / "dense")
    made.model().bfloat16().save_pretrained(root / "bf16")
    made.tokenizer().save_pretrained(root / "bf16")
    made.model(1).bfloat16().save_pretrained(root / "teacher")
    made.tokenizer().save_pretrained(root / "teacher")
    made.saved(root / "pruned")
    model = AutoModelForCausalLM.from_pretrained(root / "pruned")
    masks = prune(model, method="magnitude", sparsity=0.5, progress=False)
    model.save_pretrained(root / "pruned")
    masks.save(root / "pruned")
    return root


def distiller(model, folder, args=None, **options):
    if args is None:
        args = MamaDistillationConfig(output_dir=str(folder), sparsity=0.0, **QUIET)
    options = {"teacher_model": made.model(1), "train_dataset": made.dataset("text"), **options}
    return MamaDistillationTrainer(model, args, processing_class=made.tokenizer(), **options)


# ------------------------------------------------------------------ how models are loaded


def test_the_student_is_loaded_as_sft_loads_it(folders, tmp_path):
    """In fp32 unless asked otherwise, with the same seed, and moved as far by training."""
    moved = {}
    start = weights_in(folders / "dense")
    for name, build in (
        ("sft", lambda: trl.SFTTrainer(
            str(folders / "bf16"), trl.SFTConfig(output_dir=str(tmp_path / "sft"), **QUIET),
            train_dataset=made.dataset("text"),
        )),
        ("ours", lambda: MamaDistillationTrainer(
            str(folders / "bf16"), teacher_model=str(folders / "teacher"), train_dataset=made.dataset("text"),
            args=MamaDistillationConfig(output_dir=str(tmp_path / "ours"), sparsity=0.0, **QUIET),
        )),
    ):
        trainer = build()
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        state = torch.get_rng_state()
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.train()
        changed = sum(int((p != before[n]).sum()) for n, p in trainer.model.named_parameters())
        moved[name] = changed / sum(p.numel() for p in before.values()), state
    assert moved["ours"][0] == pytest.approx(moved["sft"][0], abs=0.1) and moved["ours"][0] > 0.5
    assert start


def test_loading_options_reach_student_and_teacher(folders, tmp_path):
    args = MamaDistillationConfig(
        output_dir=str(tmp_path), sparsity=0.0, model_init_kwargs={"dtype": "bfloat16", "attn_implementation": "eager"},
        teacher_model_name_or_path=str(folders / "teacher"), **QUIET,
    )
    trainer = distiller(str(folders / "dense"), tmp_path, args, teacher_model=None)
    assert trainer.model.dtype == torch.bfloat16 and trainer.model.config._attn_implementation == "eager"
    # The student's options are not the teacher's: it comes as it was saved.
    assert trainer.teacher_model.dtype == torch.bfloat16 and trainer.teacher_model.config._attn_implementation == "sdpa"
    args.teacher_model_init_kwargs, args.model_init_kwargs = {"dtype": "float32"}, None
    assert distiller(str(folders / "dense"), tmp_path, args, teacher_model=None).teacher_model.dtype == torch.float32
    args.teacher_model_init_kwargs = {"dtype": "float31"}
    with pytest.raises(MamaError, match="float31"):
        distiller(str(folders / "dense"), tmp_path, args, teacher_model=None)
    args.teacher_model_init_kwargs = {"dtype": "float32"}
    with pytest.raises(MamaError, match="`teacher_model` is loaded already"):
        distiller(str(folders / "dense"), tmp_path, args)


def test_the_tokenizer_comes_from_the_student(folders, tmp_path):
    trainer = MamaDistillationTrainer(
        str(folders / "pruned"), MamaDistillationConfig(output_dir=str(tmp_path), sparsity=0.5, **QUIET),
        teacher_model=str(folders / "dense"), train_dataset=made.dataset("text"),
    )
    trainer.train()
    assert trainer.mama.sparsity == pytest.approx(0.5, abs=0.01)
    names = trainer.mama.masks.names
    trainer.save_model(str(tmp_path / "out"))
    stored = weights_in(tmp_path / "out")
    assert share({name: stored[name] == 0 for name in names}) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_what_the_loader_would_invent_is_refused(which, folders, tmp_path):
    made.classifier().save_pretrained(tmp_path / "classifier")
    made.tokenizer().save_pretrained(tmp_path / "classifier")
    models = {"student": str(folders / "dense"), "teacher": str(folders / "dense")}
    models[which] = str(tmp_path / "classifier")
    with pytest.raises(MamaError, match="LlamaForSequenceClassification.*which is no causal language model"):
        distiller(models["student"], tmp_path, teacher_model=models["teacher"])


def test_a_grpo_policy_that_is_no_language_model_is_refused(tmp_path):
    made.classifier().save_pretrained(tmp_path / "classifier")
    args = MamaGRPOConfig(output_dir=str(tmp_path), num_generations=4, **QUIET)
    with pytest.raises(MamaError, match="LlamaForSequenceClassification"):
        MamaGRPOTrainer(str(tmp_path / "classifier"), rewards, args, made.dataset("prompts"))


# ------------------------------------------------------------------ configs, folders, tags


def test_configs_of_the_parent_are_taken_over(tmp_path):
    plain = trl.GRPOConfig(
        output_dir=str(tmp_path), num_generations=2, generation_batch_size=8, learning_rate=3e-4, beta=0.0, **QUIET
    )
    trainer = MamaGRPOTrainer(
        made.model(), rewards, plain, made.dataset("prompts"), processing_class=made.tokenizer()
    )
    assert type(plain) is trl.GRPOConfig and isinstance(trainer.args, MamaGRPOConfig)
    for name, value in vars(plain).items():
        assert getattr(trainer.args, name) == value, name
    assert (trainer.args.sparsity, trainer.args.allocation) == (0.5, "reward")
    assert trainer.args.recorded == ["sensitivity", "reward"]
    trainer.train()
    assert trainer.mama.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("plain", [trl.SFTConfig, TrainingArguments])
def test_distillation_takes_what_sft_takes(plain, tmp_path, folders):
    args = plain(output_dir=str(tmp_path), learning_rate=1e-3, hub_token="secret", **QUIET)
    trainer = distiller(str(folders / "pruned"), tmp_path, args)
    assert isinstance(trainer.args, MamaDistillationConfig) and trainer.args.learning_rate == 1e-3
    assert trainer.args.hub_token == "secret" and trainer.args.mask_schedule == "hold"
    trainer.train()
    assert trainer.mama.sparsity == pytest.approx(0.5, abs=0.01)


def test_without_a_config_the_folder_is_the_parents(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda *args: True)  # as on a GPU
    grpo = MamaGRPOTrainer(
        str(folders / "dense"), rewards, train_dataset=made.dataset("prompts"), processing_class=made.tokenizer()
    )
    assert grpo.args.output_dir == "dense-GRPO"
    ours = MamaDistillationTrainer(
        str(folders / "pruned"), teacher_model=str(folders / "dense"), train_dataset=made.dataset("text")
    )
    assert ours.args.output_dir == "pruned-SFT"


def test_arguments_of_another_kind_are_one_sentence(folders, tmp_path):
    common = dict(train_dataset=made.dataset("prompts"), processing_class=made.tokenizer())
    with pytest.raises(MamaError, match="`args` is a DPOConfig: this trainer takes a MamaGRPOConfig, or a GRPOConfig"):
        MamaGRPOTrainer(made.model(), rewards, trl.DPOConfig(output_dir=str(tmp_path), **QUIET), **common)
    with pytest.raises(MamaError, match="`args` is a DPOConfig"):
        MamaDistillationTrainer(made.model(), trl.DPOConfig(output_dir=str(tmp_path), **QUIET), **common)
    for teacher in (made.model(1), str(folders / "dense")):
        with pytest.raises(MamaError, match="give the teacher by name"):
            MamaDistillationTrainer(made.model(), teacher, **common)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        MamaGRPOTrainer(made.model(), rewards, trane_dataset=made.dataset("prompts"))


def test_positional_arguments_behind_args(tmp_path):
    args = MamaGRPOConfig(output_dir=str(tmp_path), num_generations=4, **QUIET)
    trainer = MamaGRPOTrainer(made.model(), rewards, args, made.dataset("prompts"), None, made.tokenizer())
    assert len(trainer.train_dataset) == 24 and trainer.processing_class.eos_token == "<eos>"


def test_tags_and_card(folders, tmp_path):
    trainer = distiller(made.model(), tmp_path)
    assert trainer.model.model_tags == ["trl", "sft", "distillation", "mama", "pruning"]
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert all(f"- {tag}\n" in card for tag in ("sft", "distillation", "mama", "pruning")) and "## Pruning" in card


# ------------------------------------------------------------------ refused at construction


def lora(model):
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


def configured(folder, **options):
    return distiller(made.model(), folder, MamaDistillationConfig(output_dir=str(folder), **options, **QUIET))


ADAPTERS = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")


@pytest.mark.parametrize("build, said", [
    (lambda f: distiller(lora(made.model()), f), "adapters"),
    (lambda f: distiller(made.model(), f, peft_config=ADAPTERS), "`peft_config`"),
    (lambda f: distiller(made.model(), f, quantization_config=object()), "`quantization_config`"),
    (lambda f: configured(f, save_total_limit=1), "`save_total_limit` is 1"),
    (lambda f: distiller(made.model(), f, compute_loss_func=print), "`compute_loss_func`"),
    (lambda f: configured(f, loss_type="dft"), "`cross_entropy_weight` is 0"),
    (lambda f: configured(f, label_smoothing_factor=0.1), "`cross_entropy_weight` is 0"),
    (lambda f: configured(f, label_smoothing_factor=0.1, loss_type="dft", cross_entropy_weight=1.0), "no effect"),
    (lambda f: configured(f, target_modules=["nothing"]), "leaves nothing"),
    (lambda f: distiller(made.model(), f, teacher_model=made.classifier()), "predicts no tokens"),
    (lambda f: distiller(made.model(), f, teacher_model=None), "`teacher_model` is missing"),
], ids=str)
def test_distillation_refuses_at_construction(build, said, tmp_path):
    with pytest.raises(MamaError, match=said) as caught:
        build(tmp_path)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("model, changes, config, said", [
    (lora, {}, {}, "adapters"),
    (lambda m: m, dict(save_total_limit=1), {}, "`save_total_limit` is 1"),
    (lambda m: m, {}, dict(target_modules=["nothing"]), "leaves nothing"),
    (lambda m: m, {}, dict(redistribution="bias"), "`redistribution` is 'bias'"),
])
def test_a_trainer_with_the_callback_refuses_at_construction(model, changes, config, said, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), **{**QUIET, **changes})
    data = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 8, "labels": [[5, 6, 7]] * 8})
    with pytest.raises(MamaError, match=said):
        Trainer(model(made.model()), args, train_dataset=data, callbacks=[MamaCallback(MamaConfig(**config))])


def test_a_generation_config_that_cannot_be_saved_is_found_before_training(tmp_path):
    model = made.model()
    model.generation_config.temperature = 0.5  # without do_sample, transformers refuses to write it
    data = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 8, "labels": [[5, 6, 7]] * 8})
    args = TrainingArguments(output_dir=str(tmp_path), **QUIET)
    with pytest.raises(MamaError, match="`generation_config` cannot be saved.*temperature") as caught:
        Trainer(model, args, train_dataset=data, callbacks=[MamaCallback()])
    assert len(str(caught.value)) < 300
    trainer = Trainer(made.model(), args, train_dataset=data, callbacks=[MamaCallback()])
    trainer.model.generation_config.num_beams = -1
    trainer.model.generation_config.temperature = 0.5
    with pytest.raises(MamaError, match="`generation_config` cannot be saved"):
        trainer.train()
    assert trainer.state.global_step == 0


# ------------------------------------------------------------------ before training, and the log


def test_metrics_save_and_evaluate_before_training(tmp_path, folders):
    grpo_args = MamaGRPOConfig(output_dir=str(tmp_path / "g"), num_generations=4, per_device_eval_batch_size=4, **QUIET)
    trainers = [
        distiller(str(folders / "pruned"), tmp_path / "d", eval_dataset=made.dataset("text")),
        MamaGRPOTrainer(
            made.model(), rewards, grpo_args, made.dataset("prompts"), made.dataset("prompts").select(range(2)),
            made.tokenizer(),
        ),
    ]
    for trainer in trainers:
        assert trainer.mama.metrics()["mama/sparsity"] == 0.0
        trainer.mama.save(tmp_path / "early")
        assert trainer.mama.masks is None and trainer.mama.sparsity == 0.0 and trainer.mama.trajectory is None
        assert trainer.mama.card()["sparsity"] == 0.0
        assert "eval_loss" in trainer.evaluate()
        trainer.create_model_card()


def test_the_best_model_is_chosen_by_a_number_of_sft(tmp_path):
    args = MamaDistillationConfig(
        output_dir=str(tmp_path), sparsity=0.0, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="mean_token_accuracy", **QUIET,
    )
    trainer = distiller(made.model(), tmp_path, args, eval_dataset=made.dataset("text"))
    trainer.train()
    assert trainer.state.best_metric is not None
    rows = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    logged = {key for row in rows for key in row}
    assert {"eval_mean_token_accuracy", "eval_entropy", "eval_num_tokens", "eval_loss", "eval_mama/kl"} <= logged


def test_a_mixtures_auxiliary_loss_is_added_as_in_sft(tmp_path):
    """Beside the cross-entropy and a teacher that is the student, the loss is SFT's own."""
    found = {}
    for name, coefficient in (("with", 3.0), ("without", 0.0)):
        args = MamaDistillationConfig(
            output_dir=str(tmp_path), sparsity=0.0, router_aux_loss_coef=coefficient, cross_entropy_weight=1.0,
            logging_steps=1, **QUIET,
        )
        ours = distiller(made.model(mixture=True), tmp_path, args, teacher_model=made.model(mixture=True))
        plain = trl.SFTTrainer(
            made.model(mixture=True),
            trl.SFTConfig(output_dir=str(tmp_path), router_aux_loss_coef=coefficient, logging_steps=1, **QUIET),
            train_dataset=made.dataset("text"), processing_class=made.tokenizer(),
        )
        for trainer in (ours, plain):
            trainer.train()
        found[name], expected = ours.state.log_history[0], plain.state.log_history[0]
        assert found[name]["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert ("aux_loss" in found[name]) == ("aux_loss" in expected) == (coefficient > 0)
    assert found["with"]["loss"] > found["without"]["loss"] + 3.0


def test_users_callbacks_see_masked_weights(tmp_path, folders):
    """Ours comes first among the user's, whatever list it is given in."""
    seen = []

    class Look(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.append(share({n: (p == 0).numpy() for n, p in model.named_parameters() if "mlp" in n}))

    trainer = distiller(str(folders / "pruned"), tmp_path, MamaDistillationConfig(output_dir=str(tmp_path), **QUIET),
                        callbacks=[Look()])
    trainer.train()
    assert seen == [pytest.approx(0.5, abs=0.05)] * 2
