"""What a run leaves behind beside the model: its speed, its log, its loss curve."""

import functools
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerState

from ..plan.speed import GPUS
from .engine import numel

# Two of the Okabe-Ito colours and a neutral, told apart with any colour vision; the line styles differ too.
TRAIN, HELD_OUT, BIGRAM = "#0072B2", "#D55E00", "#555555"


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its name; None for one that is not known."""
    return next((gpu.flops for part, gpu in GPUS.items() if part in device), None)


def flops_per_token(model: torch.nn.Module) -> float:
    """FLOPs that training on a token needs in products with weights: 2 forward, 2 for the gradient of what they are
    applied to and, where they are trained, 2 for their own, per weight that a token meets. Attention itself is left
    out, as it depends on the documents' lengths; so are recomputation and the embedding, which is no product.
    """
    config, total = model.config, 0.0
    for name, p in model.named_parameters():
        ndim = len(getattr(p, "ds_shape", p.shape))  # ZeRO-3's
        if ndim < 2 or "embed_tokens" in name or name.endswith("proj_bias"):
            continue
        share = config.num_experts_per_tok / config.num_local_experts if ndim == 3 else 1.0
        total += (6.0 if p.requires_grad else 4.0) * share * numel(p)
    return total


class ExpertLoad:
    """How many tokens each expert gets in training, counted on the device, not synchronised before it is asked for."""

    def __init__(self, model: torch.nn.Module):
        routers = [module for name, module in model.named_modules() if name.endswith("mlp.router")]
        self.counts = None
        if routers:
            shape = len(routers), model.config.num_local_experts
            self.counts = torch.zeros(shape, dtype=torch.int64)
        for layer, router in enumerate(routers):
            router.register_forward_hook(functools.partial(self._count, layer))

    def _count(self, layer: int, router, args, output) -> None:
        if router.training:
            indices = output[-1].detach().flatten()
            self.counts = self.counts.to(indices.device)  # known now: FSDP moves the model after it was built
            self.counts[layer].scatter_add_(0, indices, torch.ones_like(indices))

    def take(self) -> dict[str, float]:
        """The fullest expert's tokens over the mean, averaged over layers and in the worst one, since the last call."""
        if self.counts is None or not bool(self.counts.any()):
            return {}
        load = (self.counts.amax(1) / self.counts.double().mean(1)).tolist()
        self.counts.zero_()
        return {"expert_load": round(statistics.mean(load), 3), "expert_load_worst": round(max(load), 3)}


class Speed(TrainerCallback):
    """Real tokens a second, optimizer step by optimizer step, and peak memory. Evaluation and saving do not count.

    Args:
        model: a gpt-oss, for `entries` to tell how well the GPU and the experts are used.
    """

    def __init__(self, model: torch.nn.Module | None = None):
        self.steps: list[float] = []
        self._seconds: list[float] = []
        self._logged = 0  # steps that `entries` has told of
        self._model, self._flops, self._processes = model, None, 1
        self._load = ExpertLoad(model) if model is not None else None

    def entries(self, state: TrainerState) -> dict[str, float]:
        """What the log of the steps since the last call says: tokens_per_second (of all processes), mfu (of the GPUs'
        bf16 peak, see flops_per_token), memory_gib (this process's peak), expert_load (its tokens, see ExpertLoad) and
        seconds_left of training."""
        seconds = self._seconds[self._logged :]
        if not seconds:
            return {}
        tokens = sum(speed * time for speed, time in zip(self.steps[self._logged :], seconds, strict=True))
        self._logged = len(self._seconds)
        found = {"tokens_per_second": round(tokens / sum(seconds), 1)}
        if self._flops and torch.cuda.is_available() and (peak := peak_flops(torch.cuda.get_device_name())):
            found["mfu"] = round(self._flops * tokens / sum(seconds) / peak / self._processes, 4)
        found["memory_gib"] = round(self.peak_memory() / 2**30, 2)
        if self._load is not None:
            found |= self._load.take()
        each = statistics.median(self._seconds[1:] or self._seconds)
        return found | {"seconds_left": round(each * max(0, state.max_steps - state.global_step))}

    def on_train_begin(self, args, state, control, **kwargs):
        self._processes = args.world_size
        if self._model is not None:
            self._flops = flops_per_token(self._model)  # now that adapters have frozen what they freeze
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_begin(self, args, state, control, **kwargs):
        self._tokens, self._start = state.num_input_tokens_seen, _now()

    def on_step_end(self, args, state, control, **kwargs):
        self._seconds.append(_now() - self._start)
        self.steps.append((state.num_input_tokens_seen - self._tokens) / self._seconds[-1])

    def tokens_per_second(self) -> float:
        """Median over the steps, without the first one, which compiles and allocates."""
        return statistics.median(self.steps[1:] or self.steps or [float("nan")])

    @staticmethod
    def peak_memory() -> int:
        """Bytes: the GPU's peak since training began, or the process's on a CPU."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        if sys.platform == "win32":
            import psutil

            return psutil.Process().memory_info().peak_wset
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def write_log(history: list[dict], path: Path) -> None:
    """The trainer's log, one JSON object a line."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")


def plot_loss(history: list[dict], path: Path, *, bigram: float | None = None) -> None:
    """The loss against training tokens as a PNG: training, held-out, and the bigram entropy as a line to get below.

    Args:
        history: entries with num_input_tokens_seen and loss or eval_loss, in nats a token.
        path: of the image.
        bigram: nats a token.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, label, colour, style in (
        ("loss", "training", TRAIN, "-"),
        ("eval_loss", "held-out", HELD_OUT, "o--"),
    ):
        points = [(entry["num_input_tokens_seen"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=4)
    if bigram is not None:
        axes.axhline(bigram, color=BIGRAM, linestyle=":", label=f"held-out bigram entropy ({bigram:.2f})")
    axes.set(xlabel="training tokens", ylabel="loss (nats per token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
