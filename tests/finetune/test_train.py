"""Runs: they learn, packed documents stay apart, they resume, and what is wrong is said before they start."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import SFTTrainer

from gptoss_kernels.finetune import harmony, preflight, train
from gptoss_kernels.finetune.config import DataArguments
from gptoss_kernels.finetune.data import Split, encode, load_splits, load_tokenizer, prepare
from gptoss_kernels.finetune.errors import SetupError
from gptoss_kernels.finetune.preflight import check_processes, check_settings, find_checkpoint
from gptoss_kernels.finetune.report import Speed, plot_loss
from gptoss_kernels.finetune.sample import render, reply, stream

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "Clara has 14 apples, buys 5 more and gives 3 away. How many apples does Clara have now?"


def make_trainer(arguments) -> train.Trainer:
    """The trainer that a run would make."""
    tokenizer = load_tokenizer("data/tokenizer", conversation_date="2025-06-28")
    train_data, test_data = (
        prepare(split, tokenizer, arguments, packing=arguments.training.packing)[0]
        for split in load_splits(arguments.data, held_out=True)
    )
    return train.Trainer(
        model=train.make_model(arguments, tokenizer),
        args=arguments.training,
        train_dataset=train_data,
        eval_dataset=test_data,
        processing_class=tokenizer,
    )


def test_a_run_learns_and_leaves_its_results(settings, dataset, capsys):
    arguments = settings(
        max_steps=120,
        learning_rate=1e-2,
        adam_beta2=0.95,
        gradient_accumulation_steps=2,
        logging_steps=20,
        eval_on_start="true",
        eval_strategy="steps",
        eval_steps=60,
        sample_prompt=PROMPT,
        sample_tokens=16,
    )
    result = train.run(arguments)
    assert result.last_loss < result.first_loss / 2
    assert result.last_loss < result.bigram
    assert abs(result.first_loss - math.log(2048)) < 0.5, "random weights know nothing"
    assert 0.5 < result.bigram < 3 and result.tokens_per_second > 0 and result.peak_memory > 0

    output = Path(arguments.training.output_dir)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "loss.png", "log.jsonl"):
        assert (output / name).stat().st_size > 0, name
    entries = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    held_out = [entry["eval_loss"] for entry in entries if "eval_loss" in entry]
    assert len(held_out) == 3 and held_out[0] == result.first_loss and held_out[-1] == result.last_loss
    assert sum("loss" in entry for entry in entries) == 6
    with Image.open(output / "loss.png") as image:
        assert image.format == "PNG" and len(image.convert("RGB").getcolors(1 << 24)) > 100

    said = capsys.readouterr().out
    for line in (
        "attention gptoss_triton (backend reference), torch.float32, on cpu",
        "sample before training",
        "sample after training",
        f"held-out loss: {result.first_loss:.4f} at the start, {result.last_loss:.4f} at the end",
        f"held-out bigram entropy: {result.bigram:.4f}",
    ):
        assert line in said
    assert "WARNING: the held-out loss" not in said

    # The saved model is the trained one: it replies in Harmony, and to the same prompt as the sample.
    reply = stream(
        model=str(output),
        adapter=None,
        prompt=PROMPT,
        system=None,
        max_new_tokens=16,
        temperature=0.0,
        reasoning_effort="medium",
        conversation_date="2025-06-28",
        dtype="auto",
        attn_implementation="gptoss_triton",
    )
    assert reply in said.split("sample after training")[1]
    assert reply.startswith("<|channel|>analysis<|message|>")


def test_a_run_that_learns_nothing_says_so(settings, capsys):
    train.run(settings(max_steps=1, learning_rate=1e-9, eval_strategy="steps", eval_steps=1))
    assert "WARNING: the held-out loss did not get below the bigram entropy" in capsys.readouterr().out


WEIGHTED = '{"analysis": 0.25, "final": 2}'
MARKS = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def weighted_sum(model, batch) -> torch.Tensor:
    """Sum of weight * -log p over a batch, from full logits."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "loss_weights")}
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    targets = batch["input_ids"][:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * batch["loss_weights"][:, 1:].flatten()).sum()


def test_held_out_loss_is_the_weighted_mean_over_tokens(settings):
    trainer = make_trainer(settings(eval_strategy="steps", eval_steps=1, channel_weights=WEIGHTED))
    lengths = {len(row["input_ids"]) for row in trainer.eval_dataset}
    assert len(lengths) > 1, "rows of one length would hide a mean over batches"
    total, weight = 0.0, 0.0
    for batch in trainer.get_eval_dataloader():
        assert {0, 0.25, 2} == set(batch["loss_weights"].unique().tolist())
        with torch.no_grad():
            total += weighted_sum(trainer.model, batch).item()
        weight += batch["loss_weights"].sum().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / weight, rel=1e-6)


@pytest.mark.parametrize("packing", ["true", "false"])
@pytest.mark.parametrize("weights", [None, WEIGHTED, '{"analysis": 2.5e-7, "final": 2e-6}'])
def test_gradient_is_that_of_the_weighted_mean_over_the_step(settings, packing, weights):
    """Micro-batches of different lengths, with weights of any scale."""
    keys = {} if weights is None else {"channel_weights": weights}
    trainer = make_trainer(settings(packing=packing, gradient_accumulation_steps=3, **keys))
    model = trainer.model
    loader = trainer.get_train_dataloader()
    batches, total = trainer.get_batch_samples(iter(loader), 3, trainer.args.device)
    trainer.current_gradient_accumulation_steps = 3
    assert len({batch["loss_weights"].sum().item() for batch in batches}) == 3
    loss = sum(weighted_sum(model, batch) for batch in batches) / sum(b["loss_weights"].sum() for b in batches)
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    found = sum(trainer.training_step(model, dict(batch), total) for batch in batches)
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6, msg=name)


def test_weights_of_one_change_nothing(settings):
    trainer = make_trainer(settings())
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    labels = (batch["labels"] != -100).sum()
    assert trainer._get_num_items_in_batch([batch], labels.device) == labels
    plain = {key: value for key, value in batch.items() if key != "loss_weights"}
    with torch.no_grad():
        theirs = SFTTrainer.compute_loss(trainer, trainer.model, plain, num_items_in_batch=labels)
        ours = trainer.compute_loss(trainer.model, batch, num_items_in_batch=labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_two_processes_take_the_step_of_one(shapes, dataset, tmp_path):
    """Each row's share in the step is its weight's, on whichever process it is."""
    keys = {
        "model_name_or_path": shapes, "model_init": "random", "dataset_name": dataset, "dtype": "float32",
        "bf16": "false", "use_cpu": "true", "packing": "true", "max_length": "384", "channel_weights": WEIGHTED,
        "per_device_train_batch_size": "1", "gradient_checkpointing": "false", "max_steps": "2",
        "learning_rate": "0.1", "optim": "sgd", "max_grad_norm": "1e9",
        "save_strategy": "no", "report_to": "none", "disable_tqdm": "true",
        "eval_strategy": "no",
    }  # fmt: skip
    weights = {}
    for processes in (1, 2):
        output = tmp_path / str(processes)
        options = {**keys, "gradient_accumulation_steps": str(4 // processes), "output_dir": str(output)}
        command = [sys.executable, "sft.py"]
        if processes == 2:
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "sft.py"]
        command += [f"--{key}={value}" for key, value in options.items()]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0, result.stderr[-2000:]
        weights[processes] = load_file(output / "model.safetensors")
    for name, tensor in weights[1].items():
        torch.testing.assert_close(weights[2][name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_packed_documents_do_not_see_each_other(settings, batch_size):
    trainer = make_trainer(
        settings(per_device_train_batch_size=batch_size, eval_strategy="steps", eval_steps=1, channel_weights=WEIGHTED)
    )
    model = trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    ids, starts = batch["input_ids"], batch["cu_seq_lens_q"].tolist()
    assert ids.shape[0] == 1, "rows of a batch are joined"
    assert ids.shape[1] > (batch_size - 1) * 384 and len(starts) > 2 * batch_size
    assert batch["position_ids"][0, starts[:-1]].tolist() == [0] * (len(starts) - 1)
    assert batch["loss_weights"][0, starts[:-1]].tolist() == [0] * (len(starts) - 1)
    assert "attention_mask" not in batch

    def loss(**inputs) -> float:
        with torch.no_grad():
            return trainer.compute_loss(model, inputs).item()

    trainer._held_out = torch.zeros(2, dtype=torch.float64)
    packed = loss(**batch)
    total = 0.0
    for start, end in zip(starts, starts[1:], strict=False):
        part = {key: batch[key][:, start:end] for key in ("input_ids", "labels", "loss_weights")}
        total += loss(**part, position_ids=torch.arange(end - start)[None]) * part["loss_weights"].sum().item()
    assert packed == pytest.approx(total / batch["loss_weights"].sum().item(), abs=1e-5)

    # Either of the two carries the boundaries; without both, documents leak and the loss shows it.
    positions_alone = {k: v for k, v in batch.items() if k not in MARKS or k == "position_ids"}
    assert loss(**positions_alone) == pytest.approx(packed, abs=1e-5)
    unmarked = {k: v for k, v in batch.items() if k not in MARKS}
    unmarked["attention_mask"] = torch.ones_like(ids)
    assert abs(loss(**unmarked) - packed) > 1e-4


@pytest.mark.parametrize("coefficient", [None, 0.5])
def test_router_auxiliary_loss_is_off_unless_asked_for(settings, coefficient):
    keys = {} if coefficient is None else {"router_aux_loss_coef": coefficient}
    trainer = make_trainer(settings(**keys))
    assert trainer.aux_loss_enabled is (coefficient is not None)
    assert trainer.model.config.output_router_logits is (coefficient is not None)
    assert trainer.model.config.router_aux_loss_coef == (coefficient or 0.0)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch)).item()
    plain = (weighted_sum(trainer.model, batch) / batch["loss_weights"].sum()).item()
    # A balanced router's auxiliary loss is about top_k = 2, so half of it adds about 1.
    assert loss - plain == pytest.approx(0 if coefficient is None else 1, abs=1e-5 if coefficient is None else 0.2)


class Interrupt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def one_thread():
    """On a busy CPU two threads share the work differently from run to run, and the last bit of a sum with it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_an_interrupted_run_resumes_to_the_same_loss(settings, tmp_path, one_thread):
    keys = {
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 7,
        "lr_scheduler_type": "cosine",
        "gradient_accumulation_steps": 2,
    }
    whole = train.run(settings(output_dir=str(tmp_path / "whole"), **keys))
    cut = str(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        train.run(settings(output_dir=cut, **keys), callbacks=(Interrupt(5),))
    # As if the run had been cut off while it saved: this one must be passed over.
    (Path(cut) / "checkpoint-5").mkdir()

    with pytest.raises(SetupError, match="holds an earlier run .*--resume_from_checkpoint true"):
        train.run(settings(output_dir=cut, **keys))
    resumed = train.run(settings(output_dir=cut, resume_from_checkpoint="true", **keys))
    assert resumed.last_loss == pytest.approx(whole.last_loss, abs=1e-6)
    logs = {}
    for name in ("whole", "cut"):
        entries = map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
        logs[name] = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    assert logs["whole"] == logs["cut"] and [step for step, _ in logs["whole"]] == list(range(1, 8))


def test_adapters_train_save_and_reply(settings, tmp_path, capsys):
    base = tmp_path / "base"
    train.run(settings(output_dir=str(base), max_steps=1))
    before = (base / "model.safetensors").read_bytes()
    arguments = settings(
        model_name_or_path=str(base),
        model_init="pretrained",
        use_peft="true",
        lora_target_modules="all-linear",
        lora_dropout=0.0,
        gradient_checkpointing="true",
        dtype="bfloat16",
    )
    train.run(arguments)
    adapter = Path(arguments.training.output_dir)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert {name.split(".")[-1] for name in config["target_modules"]} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert (adapter / "adapter_model.safetensors").is_file() and not (adapter / "model.safetensors").exists()
    assert (base / "model.safetensors").read_bytes() == before

    question = dict(
        model=str(base),
        prompt=PROMPT,
        system=None,
        max_new_tokens=8,
        temperature=0.0,
        reasoning_effort="medium",
        conversation_date="2025-06-28",
        dtype="float32",
        attn_implementation="gptoss_triton",
    )
    capsys.readouterr()
    reply = stream(adapter=str(adapter), **question)
    assert reply in capsys.readouterr().out
    with pytest.raises(SetupError, match="adapter: cannot load"):
        stream(adapter=str(tmp_path), **question)


def test_a_reply_begins_where_training_does(tokenizer):
    """The prompt in generation is the training example up to its first token that is trained."""
    data = DataArguments(reasoning_effort="low", conversation_date="2024-01-31")
    system, user = "reasoning language: French", "1 + 1?"
    answer = {"role": "assistant", "thinking": "Deux.", "content": "2"}
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}, answer]
    (document,) = encode(Split("train", [{"messages": messages}], ["here"]), tokenizer, data)
    prompt = harmony.encode(render(user, system, data.rendering()), tokenizer).input_ids
    assert document.input_ids[: len(prompt)].tolist() == prompt
    assert (document.loss_weights > 0).nonzero()[0].tolist() == list(range(len(prompt), len(document.input_ids)))

    said = []

    class Model(torch.nn.Module):
        device = "cpu"

        def generate(self, input_ids, **settings):
            said.append(settings)
            return torch.cat([input_ids, torch.tensor([[tokenizer.convert_tokens_to_ids("<|call|>")]])], dim=1)

    assert reply(Model(), tokenizer, user, system=system, rendering=data.rendering()) == "<|call|>"
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|return|>", "<|call|>")]
    assert said[0]["eos_token_id"] == ends and said[0]["attention_mask"].shape == (1, len(prompt))
    unloaded = dict.fromkeys(("adapter", "max_new_tokens", "temperature", "dtype", "attn_implementation"))
    for prompt, date, message in (("", "2024-01-31", "messages"), ("Hi", "today", "conversation_date")):
        with pytest.raises(SetupError, match=message):
            stream("no-model", prompt=prompt, system=None, reasoning_effort="low", conversation_date=date, **unloaded)


def test_random_weights_bring_their_own_data(settings, capsys, dataset):
    arguments = settings(dataset_name="HuggingFaceH4/Multilingual-Thinking", test_split_size=0.1)
    arguments.on_command_line = frozenset({"model_init"})
    train.use_shipped(arguments, print)
    assert (arguments.model.tokenizer_name, arguments.data.dataset_name) == ("data/tokenizer", "data/reasoning")
    assert arguments.data.test_split_size is None
    said = capsys.readouterr().out
    assert "tokenizer data/tokenizer" in said and "data set data/reasoning instead of HuggingFaceH4" in said

    arguments = settings(tokenizer_name="mine")  # dataset_name stands on the command line
    train.use_shipped(arguments, print)
    assert (arguments.model.tokenizer_name, arguments.data.dataset_name) == ("mine", dataset)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"attn_implementation": "eager"}, "'eager' lets packed documents attend to each other"),
        ({"attn_implementation": "flex_attention"}, "'flex_attention' lets packed documents"),
        ({"attn_implementation": "eager", "packing": "false", "eval_packing": "true"}, "attn_implementation: 'eager'"),
        (
            {"packing_strategy": "wrapped"},
            "packing_strategy: expected 'bfd', got 'wrapped'; documents are packed whole",
        ),
        ({"packing_strategy": "bfd_split"}, "packing_strategy: expected 'bfd', got 'bfd_split'"),
        ({"completion_only_loss": "false"}, "completion_only_loss: expected None or True, got False"),
        ({"loss_type": "dft"}, "loss_type: expected 'nll', got 'dft'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: expected 0, got 0.1"),
        ({"dataset_text_field": "body"}, "dataset_text_field: expected 'text', got 'body'"),
        ({"shuffle_dataset": "true"}, "shuffle_dataset: expected False, got True"),
        ({"chat_template_path": "a.jinja"}, "chat_template_path: expected None, got 'a.jinja'"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of: packed rows have no padding"),
        ({"max_length": "none"}, "max_length: expected the length of a packed row"),
        ({"load_in_4bit": "true"}, "load_in_8bit, load_in_4bit: not for gpt-oss"),
        ({"report_to": "neptune"}, "report_to: neptune is not installed"),
        ({"optim": "adamw_bnb_8bit"}, "optim: adamw_bnb_8bit needs bitsandbytes"),
    ],
)
def test_settings_that_cannot_work(settings, monkeypatch, keys, said):
    find_spec = preflight.importlib.util.find_spec
    missing = {"neptune", "bitsandbytes"}
    monkeypatch.setattr(
        preflight.importlib.util, "find_spec", lambda name, *a: None if name in missing else find_spec(name, *a)
    )
    with pytest.raises(SetupError) as error:
        check_settings(settings(**keys))
    assert said in str(error.value)


def test_settings_that_work(settings):
    for keys in (
        {},
        {"packing": "false", "attn_implementation": "eager"},
        {"attn_implementation": "flash_attention_4"},
        {"packing": "false", "pad_to_multiple_of": 8},
        {"packing": "false", "max_length": "none"},
        {"packing": "false", "padding_free": "true"},
        {"assistant_only_loss": "true", "completion_only_loss": "true"},
    ):
        check_settings(settings(**keys))


def test_models_that_do_not_fit(settings, tokenizer, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(SetupError, match="expected a gpt_oss model, .* is a llama"):
        train.make_model(settings(model_name_or_path=str(other)), tokenizer)
    with pytest.raises(SetupError, match="max_length: .* knows 1024 positions, got 4096"):
        train.make_model(settings(max_length=4096), tokenizer)
    small = tmp_path / "small.json"
    small.write_text(json.dumps({"model_type": "gpt_oss", "vocab_size": 512}))
    with pytest.raises(SetupError, match=f"{len(tokenizer)} tokens do not fit the model's vocabulary of 512"):
        train.make_model(settings(model_name_or_path=str(small)), tokenizer)


def test_distributed_configuration_without_effect(monkeypatch, tmp_path):
    check_processes(8, 8, 1)
    check_processes(None, 4, 8)
    with pytest.raises(SetupError, match="num_processes: this configuration is for 8, and 1 is running; .*--num_proc"):
        check_processes(8, 1, 1)
    with pytest.raises(SetupError, match="num_processes: this configuration is for 1, and 8 is running"):
        check_processes(1, 8, 1)
    with pytest.raises(SetupError, match="one process sees 4 GPUs"):
        check_processes(1, 1, 4)
    # What `accelerate config` wrote has no effect on a plain `python sft.py`.
    own = tmp_path / "default_config.yaml"
    own.write_text((ROOT / "configs" / "zero3.yaml").read_text())
    config_args = sys.modules["accelerate.commands.config.config_args"]
    for module in (config_args, preflight):
        monkeypatch.setattr(module, "default_config_file", str(own))
    monkeypatch.setattr(config_args, "default_yaml_config_file", str(own))
    with pytest.raises(SetupError, match="for 8, and 1 is running"):
        check_processes(None, 1, 1)
    check_processes(1, 1, 1)


def test_nothing_of_an_earlier_run_is_lost_silently(tmp_path, capsys):
    run = tmp_path / "run"
    assert find_checkpoint(str(run), None, False) is None
    with pytest.raises(SetupError, match="holds no complete checkpoint"):
        find_checkpoint(str(run), "true", False)
    with pytest.raises(SetupError, match="elsewhere is no complete checkpoint"):
        find_checkpoint(str(run), "elsewhere", False)
    for step in (9, 10, 11):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        if step != 11:
            (run / f"checkpoint-{step}" / "trainer_state.json").touch()
    (run / "model.safetensors").touch()
    for resume in (None, "false"):
        with pytest.raises(SetupError, match="checkpoint-10, checkpoint-11, model.safetensors"):
            find_checkpoint(str(run), resume, False)
    assert find_checkpoint(str(run), "true", True) == str(run / "checkpoint-10")
    assert find_checkpoint(str(run), str(run / "checkpoint-9"), False) == str(run / "checkpoint-9")
    with pytest.raises(SetupError, match="checkpoint-11 is no complete checkpoint"):
        find_checkpoint(str(run), str(run / "checkpoint-11"), False)
    assert find_checkpoint(str(run), None, True) is None
    assert "is replaced" in capsys.readouterr().out
    assert not list(run.glob("checkpoint-*"))


def test_speed_counts_tokens_of_steps_after_the_first():
    speed = Speed()
    speed.steps = [1.0, 10.0, 30.0, 20.0]
    assert speed.tokens_per_second() == 20.0
    speed.steps = [7.0]
    assert speed.tokens_per_second() == 7.0


def test_loss_plot_takes_a_log_without_held_out_losses(tmp_path):
    plot_loss([{"loss": 1.0, "num_input_tokens_seen": 5}, {"train_runtime": 1}], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 0


def test_errors_reach_the_user_as_one_line():
    command = [sys.executable, "sft.py", "--config", "configs/sft_tiny.yaml", "--dataset_name", "no/such.jsonl"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == "sft.py: error: dataset_name: there is no file or folder no/such.jsonl"
