"""Memory by part against context, stacked, with the GPU's line."""

import math

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

from .memory import GIB, Settings, predict

# label -> parts of Memory, from the bottom up
GROUPS = {
    "weights": ("weights_dense", "weights_packed", "gathered", "dequantization_buffer"),
    "adapters, gradients, optimizer": ("adapters", "gradients", "optimizer_states"),
    "layers' inputs": ("checkpoints",),
    "kept instead of recomputed": ("kept_attention", "kept_experts", "kept_layers"),
    "the layer in its backward pass": ("recomputed_layer", "transients"),
    "LM head and loss": ("lm_head",),
}
# Okabe and Ito's colours, which are told apart with any colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#56B4E9", "#CC79A7", "#F0E442", "#999999")
POINTS = 48


def draw(config, settings: Settings, path: str, title: str) -> None:
    """Writes the figure.

    Args:
        config, settings: as for `predict`; the context is marked.
        path: where to, with a suffix that matplotlib knows.
        title: above it.

    Raises:
        ValueError, OSError: the file cannot be written.
    """
    first, last = math.log2(1024), math.log2(max(2048, config.max_position_embeddings))
    contexts = sorted({round(2 ** (first + (last - first) * n / (POINTS - 1))) for n in range(POINTS)})
    memories = [predict(config, settings.but(context=context)) for context in contexts]
    layers = {label: [sum(m.parts[part] for part in parts) / GIB for m in memories] for label, parts in GROUPS.items()}
    layers["allocator, cuBLAS, CUDA"] = [(m.needed - m.total + m.workspaces) / GIB for m in memories]
    layers, colours = zip(
        *((item, colour) for item, colour in zip(layers.items(), COLOURS, strict=True) if max(item[1])), strict=True
    )
    figure, axes = plt.subplots(figsize=(8.5, 5), constrained_layout=True, facecolor="white")
    axes.stackplot(contexts, [sizes for _, sizes in layers], labels=[label for label, _ in layers], colors=colours)
    axes.axhline(settings.capacity / GIB, color="black", linestyle="--", linewidth=1.5)
    axes.text(contexts[0], settings.capacity / GIB, f" {settings.gpu_memory:g} GB GPU", va="bottom", color="black")
    axes.set_xscale("log", base=2)
    axes.axvline(settings.context, color="black", linestyle=":", linewidth=1)
    axes.set(xlabel="context, tokens", ylabel="memory of one GPU, GiB", xlim=(contexts[0], contexts[-1]))
    axes.set_ylim(0, 1.12 * max(settings.capacity / GIB, *(m.needed / GIB for m in memories)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_title(title.replace("; ", "\n", 1), fontsize=9)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    try:
        figure.savefig(path, dpi=150)
    finally:
        plt.close(figure)
