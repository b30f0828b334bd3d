"""A training command on two processes: the model it leaves, a damaged checkpoint, another run, a finished one."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.distributed.launch import ROOT
from tests.scripts.conftest import TEXT
from tests.tiny_tokenizer import tiny_tokenizer
from tests.training import saved

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def mama(folder, **changes):
    """(exit code, what `mama sft` on two CPU processes said)."""
    flags = {
        "accelerate_config": "ddp", "num_processes": 2, "ddp_backend": "gloo", "model_name_or_path": "model",
        "dataset_name": "train.txt", "output_dir": "out", "max_steps": 6, "save_steps": 2, "max_length": 32,
        "use_cpu": "true", "sparsity": 0.5, "mask_start": 3, "per_device_train_batch_size": 2,
        "calibration_tokens": 256, "logging_steps": 1, **changes,
    }
    command = [sys.executable, "-m", "mama_trl.cli", "sft"]
    command += [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_two_processes_agree_on_what_to_resume(tmp_path):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "train.txt").write_text(TEXT)
    out = tmp_path / "out"
    code, said = mama(tmp_path)
    assert code == 0 and saved.sparsity(out) == pytest.approx(0.5, abs=0.01), said[-3000:]
    whole = (out / "model.safetensors").read_bytes()
    code, said = mama(tmp_path, resume_from_checkpoint="true")
    assert code == 0 and "the run is finished" in said and (out / "model.safetensors").read_bytes() == whole
    with open(out / "checkpoint-6" / "rng_state_1.pth", "r+b") as file:
        file.truncate(100)
    code, said = mama(tmp_path, resume_from_checkpoint="true")
    assert code == 0 and "rng_state_1.pth has 100 bytes" in said and "passed over" in said
    assert (out / "model.safetensors").read_bytes() == whole
    code, said = mama(tmp_path, resume_from_checkpoint="true", learning_rate=1e-2)
    assert code == 2 and "belongs to another run (`learning_rate`" in said
    code, said = mama(tmp_path, overwrite="true", learning_rate=1e-2, max_steps=1, mask_start=1)
    assert code == 0 and sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1"]
