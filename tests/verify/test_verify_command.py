"""The command's exit codes and JSON, configurations of sft.py, and a run that checks itself first."""

import json

import pytest
import torch

pytest.importorskip("trl")

from gptoss_kernels.finetune import train
from gptoss_kernels.finetune.config import parse
from gptoss_kernels.finetune.errors import SetupError
from gptoss_kernels.verify import verify
from gptoss_kernels.verify.__main__ import main
from gptoss_kernels.verify.combination import SMALL

SHAPES = SMALL | {
    "model_type": "gpt_oss", "head_dim": 16, "num_attention_heads": 4, "sliding_window": 32, "hidden_size": 64,
    "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 1024,
}  # fmt: skip
CONFIG = """
model_name_or_path: {shapes}
model_init: random
dataset_name: data/reasoning
output_dir: {output}
use_cpu: true
bf16: false
dtype: float32
packing: {packing}
max_length: 384
gradient_checkpointing: false
max_steps: 1
report_to: none
disable_tqdm: true
save_strategy: "no"
use_peft: true
lora_r: 4
lora_dropout: 0.0
lora_targets: [attention, experts]
base_weights: {weights}
"""


@pytest.fixture(autouse=True)
def on_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def config(tmp_path):
    """Writes a configuration of sft.py, and gives its path."""

    def write(packing="true", weights="bf16") -> str:
        shapes, path = tmp_path / "shapes.json", tmp_path / "run.yaml"
        shapes.write_text(json.dumps(SHAPES))
        text = CONFIG.format(shapes=shapes, output=tmp_path / "run", packing=packing, weights=weights)
        path.write_text(text)
        return str(path)

    return write


def statuses(verdict: dict) -> dict[str, str]:
    return {row["check"]: row["status"] for row in verdict["checks"]}


def test_json_and_exit_codes(config, tmp_path, capsys):
    arguments = ["--device", "cpu", "--config", config()]
    assert main([*arguments, "--json", "-"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["passed"] and found["provenance"]["torch"] == torch.__version__
    (verdict,) = found["verdicts"]
    assert "LoRA r=4, packed rows" in verdict["heading"]
    assert "PASS  window" in captured.err
    by_name = statuses(verdict)
    # Only what the run uses is judged: it packs, does not checkpoint, and trains no sinks.
    not_applicable = {"padded = unpadded", "recomputation", "sink gradients"}
    assert {name for name, status in by_name.items() if status == "n.a."} == not_applicable
    assert set(by_name.values()) == {"PASS", "n.a."}

    file = tmp_path / "verdict.json"
    assert main([*arguments, "--attention", "eager", "--json", str(file)]) == 1
    assert statuses(json.loads(file.read_text())["verdicts"][0])["packed = alone"] == "FAIL"
    assert "-> documents of a row see each other" in capsys.readouterr().out

    assert main([*arguments, "--attention", "gptoss_fa4"]) == 2
    assert "error: verify: " in capsys.readouterr().out


def test_padded_rows_over_packed_weights(config):
    verdict = verify(parse(["--config", config(packing="false", weights="mxfp4")]))
    by_name = {row.check: row.status for row in verdict.rows}
    assert verdict.passed, verdict.failures
    assert {name for name, status in by_name.items() if status == "n.a."} == {
        "packed = alone", "recomputation", "sink gradients",
    }  # fmt: skip
    assert "MXFP4 experts" in verdict.heading and "padded rows" in verdict.heading


def test_a_run_checks_itself_and_stops(config, tmp_path, monkeypatch):
    arguments = parse(["--config", config(), "--verify"])
    before = torch.get_rng_state()
    assert verify(arguments).passed
    assert torch.equal(torch.get_rng_state(), before)
    assert arguments.training.output_dir == str(tmp_path / "run") and arguments.training.packing

    original = train.patch_gpt_oss

    def unpatched_experts(model, **parts):  # adapters of rank 4 that nothing applies
        from peft.tuners.lora.layer import ParamWrapper

        monkeypatch.setattr(ParamWrapper, "forward", lambda self, *args, **kwargs: self.base_layer(*args, **kwargs))
        return original(model, **parts)

    monkeypatch.setattr(train, "patch_gpt_oss", unpatched_experts)
    monkeypatch.setattr(train, "make_model", lambda *_: pytest.fail("the run went on"))
    with pytest.raises(SetupError, match="verify: adapters applied failed"):
        train.run(arguments)


def test_shapes_that_need_a_gpu_are_replaced_on_a_cpu(config):
    arguments = parse(["--config", config(), "--model_name_or_path", "gpt-oss-20b"])
    from gptoss_kernels.verify.combination import combine

    combination = combine(arguments, arguments.training.output_dir, strict=True)
    assert combination.name == "a small gpt-oss"
    assert combination.notes == ["the shapes of gpt-oss-20b need a GPU"]
