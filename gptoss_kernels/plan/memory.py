"""Memory of a training step by part: arithmetic over a model's shapes and over what this package's code holds when.

Tensors that live at the same time are added up at each moment that can be the peak: while the loss is computed, in the
backward pass of each layer, and in the optimizer's step. Names in comments are those of the code that holds them:
experts/autograd.py and lora.py, layers/loss.py, mxfp4/buffer.py, finetune/recompute.py, adamw, TRL's fused LM head.
"""

import dataclasses
import math
from dataclasses import dataclass, fields
from functools import cached_property

from ..experts.api import CHUNK as EXPERTS_CHUNK
from ..finetune.host_moments import MOMENTS, HostMoments, moved
from ..layers.chunks import chunk_size
from ..mxfp4.reference import BYTES, GROUP

GIB = 2**30
METHODS = ("lora", "full")
BASE_WEIGHTS = ("mxfp4", "bf16")
TARGETS = ("attention", "experts", "router")
RECOMPUTATION = ("lean", "auto", "fast")
STATES = ("fp32", "bf16")
IN_BACKWARD = "adamw_8bit_sr_in_backward"  # finetune/optimizer.py

# What the arithmetic cannot know. cuBLAS takes 32 MiB on Hopper, twice as train_step.csv's rows say (a handle for each
# thread, forward and backward). The ten rows of benchmarks/results/mxfp4.csv of 547ec65 and b905c43 reserved more than
# they allocated by 0.5 GiB and 4.5% of what a step makes beside weights and states, to 0.7 GiB. The CUDA context and
# its kernels, outside torch's count, are an estimate; of an H100's nominal 80 GiB torch sees 79.18 (their memory_gib).
WORKSPACES = 2 * 32 * 2**20
ALLOCATOR_BASE, ALLOCATOR_MARGIN = GIB // 2, 0.045
LASTING = ("weights_dense", "weights_packed", "gathered", "adapters", "optimizer_states", "dequantization_buffer")
CONTEXT = GIB // 2
USABLE = 0.989
# finetune/recompute.py: share of the GPU that `auto` leaves free, and its margin for layers that keep all.
RESERVE, WHOLE_MARGIN = 0.06, 1.5
OFFLOADED = 2  # layers whose inputs are on the GPU nevertheless, on their way
SMALL = 2**20  # finetune/optimizer.py's min_size: smaller tensors are trained with fp32 moments and weights


def bytes_kept(config, tokens: int, itemsize: int) -> tuple[int, int, int]:
    """Bytes a layer holds for this many tokens if it keeps attention's results, those of the experts, and the rest."""
    attention = config.num_attention_heads * (config.head_dim * itemsize + 4)
    experts = (
        config.num_experts_per_tok * (2 * config.intermediate_size * itemsize + 20) + config.hidden_size * itemsize
    )
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    rest = (heads * config.head_dim + 4 * config.hidden_size + 4 * config.num_local_experts) * itemsize
    return tokens * attention, tokens * experts, tokens * rest


def layers_that_fit(count: int, free: int, attention: int, experts: int) -> tuple[int, int]:
    """Of `count` layers, how many can keep attention's and the experts' results, of so many bytes each, in `free`."""
    first = max(0, min(count, free // attention))
    return first, max(0, min(count, (free - first * attention) // experts)) if first == count else 0


def state_bytes(optim: str, itemsize: int, sharded: bool = False) -> int:
    """Bytes that an optimizer keeps of each element of a large tensor, at the least.

    Args:
        optim: a value of sft.py's `optim`.
        itemsize: bytes of a weight.
        sharded: by engines whose masters are fp32 (DeepSpeed's mixed precision): they and both moments.
    """
    if "adam" not in optim:
        return 0
    if sharded:
        return 12
    return 2 if "8bit" in optim else 2 * itemsize


def gradient_bytes(optim: str, accumulation: int, itemsize: int) -> int:
    """Bytes of gradient that exist together of each trained element: none if each is used as soon as it is there."""
    return 0 if optim == IN_BACKWARD and accumulation == 1 else itemsize


@dataclass(frozen=True)
class Settings:
    """What is trained, on what.

    Args:
        method: "lora" or "full".
        context: tokens of a row: one document of that length.
        gpu_memory: GiB by the GPU's name, such as 80.
        gpus: how many; weights, gradients and states are spread over them if all weights are trained (ZeRO-3, FSDP2),
            and copied to each with LoRA.
        batch, accumulation: rows of a forward pass, and forward passes of a step.
        base_weights: "mxfp4" or "bf16", of the experts under adapters.
        lora_targets: out of "attention", "experts", "router".
        lora_r: rank.
        recomputation: "lean", "auto" or "fast", as sft.py's; with gradient checkpointing off it is "fast".
        offload: the layers' inputs wait in the host's memory (activation_offloading).
        optim: as sft.py's.
        on_host: share of the large tensors' moments in the host's memory (optim_args of adamw_8bit_sr_in_backward).
        itemsize: bytes of a weight and an activation.
        kept: numbers of layers that keep attention's results, the experts' and all, in place of what `recomputation`
            would choose.
        states: of sharded training: "fp32" weights and moments beside the bf16 weights, or "bf16" moments alone, what
            benchmarks/node.py measures with where fp32 ones do not fit.

    Raises:
        ValueError: a value that is none of these, or settings that exclude each other; the message names the setting.
    """

    method: str = "lora"
    context: int = 8192
    gpu_memory: float = 80.0
    gpus: int = 1
    batch: int = 1
    accumulation: int = 1
    base_weights: str = "bf16"
    lora_targets: tuple[str, ...] = ("attention",)
    lora_r: int = 8
    recomputation: str = "auto"
    offload: bool = False
    optim: str = "adamw_torch_fused"
    on_host: float = 0.0
    itemsize: int = 2
    kept: tuple[int, int, int] | None = None
    states: str = "fp32"

    def __post_init__(self):
        named = {"method": METHODS, "base_weights": BASE_WEIGHTS, "recomputation": RECOMPUTATION, "states": STATES}
        for name, choices in named.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected {' or '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("context", "gpus", "batch", "accumulation", "lora_r", "gpu_memory"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        if self.method == "lora" and (not self.lora_targets or set(self.lora_targets) - set(TARGETS)):
            got = ", ".join(self.lora_targets) or "nothing"
            raise ValueError(f"lora_targets: expected some of {', '.join(TARGETS)}, got {got}")
        if self.method == "full" and self.base_weights == "mxfp4":
            raise ValueError("base_weights: expected bf16 with method full (mxfp4 weights are frozen), got 'mxfp4'")
        if self.optim == IN_BACKWARD and self.gpus > 1:
            raise ValueError(f"optim: {self.optim} is for one GPU, got gpus {self.gpus}")
        in_backward = self.method == "full" and self.optim == IN_BACKWARD
        if not 0 <= self.on_host <= 1 or (self.on_host and not in_backward):
            raise ValueError(
                f"on_host: expected a share from 0 to 1, above 0 with method full and optim {IN_BACKWARD} only, "
                f"got {self.on_host}"
            )

    @property
    def tokens(self) -> int:
        """Of a forward pass."""
        return self.context * self.batch

    @property
    def capacity(self) -> int:
        """Bytes that CUDA has for this process, its context included."""
        return int(self.gpu_memory * GIB * USABLE)

    @property
    def sharded(self) -> bool:
        return self.method == "full" and self.gpus > 1

    @property
    def masters(self) -> bool:
        """Whether fp32 weights and moments are kept beside bf16 weights."""
        return self.sharded and self.states == "fp32"

    def but(self, **changes) -> "Settings":
        return dataclasses.replace(self, **changes)


class Shapes:
    """Tensors of a gpt-oss of this configuration (Transformers' GptOssConfig, or anything with its fields)."""

    def __init__(self, config):
        hidden, inner, experts = config.hidden_size, config.intermediate_size, config.num_local_experts
        query, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        linear = [(hidden, query), (hidden, kv), (hidden, kv), (query, hidden)]
        self.config = config
        self.layers = config.num_hidden_layers
        self.linear = linear
        # elements of each tensor of a layer, by part
        self.layer = {
            "attention": [n * m for n, m in linear]
            + [m for _, m in linear] * config.attention_bias
            + [config.num_attention_heads],
            "router": [experts * hidden, experts],
            "experts": [experts * hidden * 2 * inner, experts * inner * hidden],
            "biases": [experts * 2 * inner, experts * hidden],
            "norms": [hidden, hidden],
        }
        self.head = config.vocab_size * hidden
        self.outside = [self.head] * (1 if config.tie_word_embeddings else 2) + [hidden]
        self.buffers = 2 * config.head_dim // 2 * 4  # bytes: rotary frequencies, and what they were at first

    @cached_property
    def layer_elements(self) -> int:
        return sum(map(sum, self.layer.values()))

    @cached_property
    def projections(self) -> int:
        """Elements of a layer that MXFP4 packs."""
        return sum(self.layer["experts"])

    @cached_property
    def parameters(self) -> int:
        return self.layers * self.layer_elements + sum(self.outside)

    def small(self) -> int:
        """Elements of the whole model in tensors below SMALL."""
        layer = sum(n for part in self.layer.values() for n in part if n < SMALL)
        return self.layers * layer + sum(n for n in self.outside if n < SMALL)

    def on_host(self, share: float) -> list[int]:
        """Elements of each tensor whose moments are on the host, in the order of the model's parameters."""
        layer = [n for part in self.layer.values() for n in part if n >= SMALL]
        large = [n for n in (self.head, *layer * self.layers, *self.outside[1:]) if n >= SMALL]
        return [large[number] for number in moved(large, share)]

    def weights(self, settings: Settings) -> tuple[int, int]:
        """Bytes of dense and of packed weights."""
        packed = self.layers * self.projections if settings.base_weights == "mxfp4" else 0
        dense = (self.parameters - packed) * settings.itemsize + self.buffers
        return dense, packed // GROUP * (BYTES + 1)

    def adapters(self, settings: Settings) -> dict[str, int]:
        """Elements of a layer's adapters by target, all of them fp32 over bf16 weights (PEFT)."""
        config, rank = self.config, settings.lora_r
        hidden, inner, experts = config.hidden_size, config.intermediate_size, config.num_local_experts
        sizes = {
            "attention": rank * sum(n + m for n, m in self.linear),
            "experts": rank * experts * (hidden + 2 * inner + inner + hidden),
            "router": rank * (hidden + experts),
        }
        return {name: size for name, size in sizes.items() if name in settings.lora_targets}


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a step, by part; they add up to `total`, torch's max_memory_allocated.

    Attributes:
        weights_dense, weights_packed: of the model, those that are frozen included.
        gathered: of a sharded model, two layers, embeddings and LM head, whole.
        adapters, gradients, optimizer_states: gradients as far as they exist at that moment; states without those on
            the host, with the buffers that they pass through.
        dequantization_buffer: of packed experts.
        checkpoints: inputs of checkpointed layers, and the routing that recomputation takes over.
        kept_attention, kept_experts, kept_layers: what `recomputation` keeps besides.
        recomputed_layer: what the layer whose backward pass runs holds, recomputed.
        transients: inside the experts' (or attention's) backward pass.
        lm_head: hidden states, a chunk of logits and gradients around the loss.
        workspaces: of cuBLAS.
        moment: where the peak is.
        kept: numbers of layers that keep attention's results, the experts', all.
    """

    weights_dense: int = 0
    weights_packed: int = 0
    gathered: int = 0
    adapters: int = 0
    gradients: int = 0
    optimizer_states: int = 0
    dequantization_buffer: int = 0
    checkpoints: int = 0
    kept_attention: int = 0
    kept_experts: int = 0
    kept_layers: int = 0
    recomputed_layer: int = 0
    transients: int = 0
    lm_head: int = 0
    workspaces: int = WORKSPACES
    moment: str = ""
    kept: tuple[int, int, int] = (0, 0, 0)

    @property
    def parts(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("moment", "kept")}

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def reserved(self) -> int:
        """torch's max_memory_reserved: with what the allocator cannot use between what comes and goes."""
        passing = sum(size for name, size in self.parts.items() if name not in LASTING)
        return self.total + ALLOCATOR_BASE + int(ALLOCATOR_MARGIN * passing)

    @property
    def needed(self) -> int:
        """Of the GPU: with the CUDA context."""
        return self.reserved + CONTEXT

    def fits(self, settings: Settings) -> bool:
        return self.needed <= settings.capacity


def predict(config, settings: Settings) -> Memory:
    """The peak of a training step through this package's kernels (patched model, fused loss, gradient checkpointing).

    Args:
        config: a GptOssConfig, or an object with its fields.
        settings: what is trained, and on what.

    Raises:
        ValueError: settings.kept asks for more layers than there are.
    """
    count = config.num_hidden_layers
    if settings.kept is not None:
        if not all(0 <= n <= count for n in settings.kept):
            raise ValueError(f"kept: expected three numbers up to {count} layers, got {settings.kept}")
        return _Step(config, settings, settings.kept).peak()
    if settings.recomputation == "fast":
        return _Step(config, settings, (count,) * 3).peak()
    memory = _Step(config, settings, (0, 0, 0)).peak()
    if settings.recomputation == "lean":
        return memory
    # As Recomputation.use_free_memory chooses after the first step, and after the second.
    attention, experts, rest = bytes_kept(config, settings.tokens, settings.itemsize)
    limit = int(settings.capacity * (1 - RESERVE))
    kept = layers_that_fit(count, limit - memory.reserved, attention, experts)
    memory = _Step(config, settings, (*kept, 0)).peak()
    if kept[1] == count:
        whole = max(0, min(count, int((limit - memory.reserved) // (WHOLE_MARGIN * rest))))
        memory = _Step(config, settings, (*kept, whole)).peak()
    return memory


def offloaded_bytes(config, settings: Settings) -> int:
    """Pinned memory of the host, for the layers' inputs of one GPU and for moments."""
    inputs = settings.offload * config.num_hidden_layers * settings.tokens * config.hidden_size * settings.itemsize
    # PyTorch pins powers of two (c10::llvm::PowerOf2Ceil in ATen/core/CachingHostAllocator.h).
    return inputs + sum(len(MOMENTS) << (n - 1).bit_length() for n in Shapes(config).on_host(settings.on_host))


class _Step:
    """Sizes of a step in which the last kept[0], [1] and [2] layers keep attention's results, the experts', all.

    Upper-case names are bytes of a token (or of a row of the experts' products, of which a token has top_k).
    """

    def __init__(self, config, settings: Settings, kept: tuple[int, int, int]):
        self.config, self.settings, self.kept = config, settings, kept
        self.shapes = Shapes(config)
        self.full = settings.method == "full"
        self.tokens = settings.tokens
        size = settings.itemsize
        heads, top_k = config.num_attention_heads, config.num_experts_per_tok
        adapters = {} if self.full else self.shapes.adapters(settings)
        self.adapters = adapters
        rank = settings.lora_r
        self.HIDDEN = config.hidden_size * size
        self.QUERY = heads * config.head_dim * size
        self.QKV = self.QUERY + 2 * config.num_key_value_heads * config.head_dim * size
        self.ROUTING = top_k * (8 + 4 + 8 + 4 + 4)  # router_indices, token, slot, expert, row
        self.ATTENTION = self.QUERY + heads * 4  # out, lse
        self.PRE = top_k * 2 * config.intermediate_size * size  # the experts' hidden
        self.ACT = self.PRE // 2
        self.ROWS = top_k * self.HIDDEN
        self.LOW_EXPERTS = top_k * math.ceil(rank / 8) * 8 * size if "experts" in adapters else 0
        # normed input, q k v after the rotation, h after attention, normed h, low ranks, and the router's and norms'
        self.REST = self.QKV + 2 * self.HIDDEN + 2 * 4 + top_k * (8 + size)
        if self.full or "attention" in adapters:
            self.REST += self.HIDDEN
        if "attention" in adapters:
            self.REST += 4 * rank * size
        self.outer = self.full or "experts" in adapters  # `weighted` is needed
        self.pass_tokens = self.tokens if self.full else min(self.tokens, EXPERTS_CHUNK)

    def constant(self) -> dict[str, int]:
        shapes, settings = self.shapes, self.settings
        dense, packed = shapes.weights(settings)
        parts = {"weights_dense": dense, "weights_packed": packed}
        if packed:
            parts["dequantization_buffer"] = shapes.layer["experts"][0] * settings.itemsize
        if not self.full:
            trained = sum(self.adapters.values()) * shapes.layers
            parts["adapters"] = 4 * trained
            parts["optimizer_states"] = trained * state_bytes(settings.optim, 4)
            return parts
        states = shapes.parameters * state_bytes(settings.optim, settings.itemsize, settings.masters)
        if settings.optim.startswith("adamw_8bit_sr"):
            blocks = (shapes.parameters - shapes.small()) // 256 * 2  # exponents
            states += blocks + shapes.small() * (8 + (4 if settings.itemsize < 4 else 0) - 2)
            if waiting := shapes.on_host(settings.on_host):
                states += len(MOMENTS) * (HostMoments.ROOM * max(waiting) - sum(waiting))
        parts["optimizer_states"] = states // settings.gpus
        if settings.sharded:
            parts["weights_dense"] = dense // settings.gpus
            parts["gathered"] = (2 * shapes.layer_elements + sum(shapes.outside)) * settings.itemsize
        return parts

    def layer_gradients(self) -> int:
        """Bytes that stay of a layer's gradients, from its backward pass on."""
        settings = self.settings
        if not self.full:
            copies = 2 if settings.gpus > 1 else 1  # DistributedDataParallel's buckets
            return 4 * copies * sum(self.adapters.values())
        each = gradient_bytes(settings.optim, settings.accumulation, settings.itemsize)
        return self.shapes.layer_elements * each // settings.gpus

    def outside_gradients(self, elements: int) -> int:
        each = gradient_bytes(self.settings.optim, self.settings.accumulation, self.settings.itemsize)
        return self.full * elements * each // self.settings.gpus

    def gradients(self, layer: int) -> int:
        """Bytes of gradients as the backward pass of this layer begins; all at -1."""
        shapes = self.shapes
        done = shapes.layers - 1 - layer
        if self.settings.accumulation > 1:
            done = shapes.layers  # of the micro-batch before
        everything = done == shapes.layers
        return done * self.layer_gradients() + self.outside_gradients(
            sum(shapes.outside) if everything else shapes.outside[-2]
        )

    def held(self, layers: int) -> dict[str, int]:
        """What the first `layers` layers hold for their backward passes."""
        count = self.shapes.layers
        attention, experts, whole = (max(0, layers - (count - kept)) for kept in self.kept)
        inputs = min(layers, OFFLOADED) if self.settings.offload else layers
        tokens, whole_experts = self.tokens, min(whole, experts)
        return {
            "checkpoints": tokens * (inputs * self.HIDDEN + layers * self.ROUTING),
            "kept_attention": tokens * attention * self.ATTENTION,
            # A layer that is not checkpointed does not keep the experts' output.
            "kept_experts": tokens
            * (experts * (self.PRE + self.LOW_EXPERTS) + (experts - whole_experts) * self.HIDDEN),
            "kept_layers": tokens * whole * self.REST,
        }

    def recomputed(self, layer: int) -> tuple[int, int]:
        """Bytes that the layer's recomputation makes beside what it kept: up to the experts, and theirs."""
        attention, experts, whole = (layer >= self.shapes.layers - kept for kept in self.kept)
        rest = 0 if whole else self.REST
        rest += 0 if attention else self.ATTENTION
        return self.tokens * rest, self.tokens * (0 if experts else self.PRE + self.LOW_EXPERTS)

    def expert_moments(self) -> tuple[tuple[int, int], ...]:
        """(transients, gradients made) at the moments that can be the largest of the experts' backward pass."""
        rows = self.ROWS + self.ACT + self.PRE  # dy_rows, dact, dhidden
        rows += self.outer * self.ACT  # weighted
        rows += self.config.num_experts_per_tok * 4  # dweight
        size = self.settings.itemsize
        factors = size * self.adapters.get("experts", 0)
        first = self.tokens * self.HIDDEN + self.pass_tokens * rows + factors  # and dy
        if not self.full:
            return ((first, 0),)
        gate_up, down = (elements * size for elements in self.shapes.layer["experts"])
        # dy, dx, the gathered x and dhidden, beside both weights' gradients
        second = self.tokens * (2 * self.HIDDEN + self.ROWS + self.PRE)
        return (first, 0), (second, gate_up + down)

    def attention_moment(self) -> tuple[int, int]:
        """The gradient that flows past, do, dq, dk, dv, delta and lse2; gradients of the experts are there."""
        transients = self.tokens * (self.HIDDEN + self.QUERY + self.QKV + 2 * 4 * self.config.num_attention_heads)
        size = self.settings.itemsize
        freed = self.full and not gradient_bytes(self.settings.optim, self.settings.accumulation, size)
        made = self.shapes.projections * size if self.full and not freed else 0
        return transients, made

    def loss(self) -> int:
        """The last layer's output, its norm's, the trained tokens' copy; logits and gradients of a chunk."""
        tokens, size, vocab = self.tokens, self.settings.itemsize, self.config.vocab_size
        if not self.full:  # layers/loss.py
            logits = chunk_size(tokens) * math.ceil(vocab / 8) * 8 * size
            return tokens * (4 * self.HIDDEN + 4 + 9) + logits  # and dhidden
        # TRL's: gradients in fp32 and in the weights' dtype, tiles of 4,096 tokens and 32,768 words
        hidden = 2 * self.HIDDEN + self.config.hidden_size * (4 + size)
        return tokens * hidden + self.shapes.head * (4 + size) + min(tokens, 4096) * min(vocab, 32768) * size

    def moments(self):
        """(name, parts besides the constant ones) of each moment that can be the peak."""
        count = self.shapes.layers
        before = self.gradients(-1) if self.settings.accumulation > 1 else 0
        yield "loss", {**self.held(count), "lm_head": self.loss(), "gradients": before}
        for layer in reversed(range(count)):
            held, there = self.held(layer + 1), self.gradients(layer)
            rest, experts = self.recomputed(layer)
            for transients, made in self.expert_moments():
                parts = {"recomputed_layer": rest + experts, "transients": transients, "gradients": there + made}
                yield f"backward pass of the experts in layer {layer}", held | parts
            transients, made = self.attention_moment()
            parts = {"recomputed_layer": rest, "transients": transients, "gradients": there + made}
            yield f"backward pass of attention in layer {layer}", held | parts
        yield "optimizer's step", {"gradients": self.gradients(-1)}

    def peak(self) -> Memory:
        constant = self.constant()
        memories = (Memory(**constant, **parts, moment=name, kept=self.kept) for name, parts in self.moments())
        return max(memories, key=lambda memory: memory.total)
