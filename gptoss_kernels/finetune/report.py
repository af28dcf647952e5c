"""What a run leaves behind beside the model: its speed, its log, its loss curve."""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

# Two of the Okabe-Ito colours and a neutral, told apart with any colour vision; the line styles differ too.
TRAIN, HELD_OUT, BIGRAM = "#0072B2", "#D55E00", "#555555"


class Speed(TrainerCallback):
    """Real tokens a second, optimizer step by optimizer step, and peak memory. Evaluation and saving do not count."""

    def __init__(self):
        self.steps: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_begin(self, args, state, control, **kwargs):
        self._tokens, self._start = state.num_input_tokens_seen, _now()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append((state.num_input_tokens_seen - self._tokens) / (_now() - self._start))

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
