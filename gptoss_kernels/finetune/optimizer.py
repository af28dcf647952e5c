"""AdamW that trains all weights of a bf16 model on one GPU: moments in 8 bits, steps taken inside the backward pass.

Libraries that come near, as their sources have it: torchao's AdamW8bit(bf16_stochastic_round=True) draws from the
global random state, compiles a graph for every shape, and keeps moments of small bf16 tensors in bf16, where
beta2 = 0.999 moves nothing; bitsandbytes' AdamW8bit has no stochastic rounding: small updates of bf16 weights are lost.
"""

from collections.abc import Iterable

import torch
from torch.optim.adamw import adamw

from ..adamw.api import adamw_step, new_state
from .errors import SetupError
from .host_moments import MOMENTS, HostMoments, moved

# Values of `optim` beside those of Transformers.
KEPT, IN_BACKWARD = "adamw_8bit_sr", "adamw_8bit_sr_in_backward"
NAMES = (KEPT, IN_BACKWARD)
_TRUTH = {"true": True, "false": False}
_ARGUMENTS = {
    "min_size": int,
    "stochastic_rounding": lambda text: _TRUTH[text.strip().lower()],
    "on_host": float,
}


def parse_arguments(optim_args: str | None) -> dict:
    """`optim_args` such as "min_size=4096, stochastic_rounding=false" as keyword arguments of `AdamW8bit`.

    Raises:
        SetupError: another key, or a value that is none.
    """
    found = {}
    for part in filter(None, (part.strip() for part in (optim_args or "").split(","))):
        name, _, text = part.partition("=")
        try:
            found[name.strip()] = _ARGUMENTS[name.strip()](text)
        except (KeyError, ValueError):
            raise SetupError(
                f"optim_args: expected min_size=ELEMENTS, stochastic_rounding=true or false, or on_host=SHARE, "
                f"got {part!r}"
            ) from None
    return found


def build(training, named_parameters: Iterable[tuple[str, torch.Tensor]], decayed: Iterable[str]) -> "AdamW8bit":
    """The optimizer that a run's settings name.

    Args:
        training: TrainingArguments with `optim` among NAMES.
        named_parameters: of the model; frozen ones are left out.
        decayed: names of those that weight decay is for.
    """
    decayed = set(decayed)
    trained = [(name, p) for name, p in named_parameters if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if (name in decayed) is decay], "weight_decay": weight_decay}
        for decay, weight_decay in ((True, training.weight_decay), (False, 0.0))
    ]
    return AdamW8bit(
        [group for group in groups if group["params"]],
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        seed=training.seed,
        in_backward=training.optim == IN_BACKWARD,
        **parse_arguments(training.optim_args),
    )


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with decoupled weight decay, 8-bit moments and stochastic rounding of bf16 weights.

    Tensors of fewer than `min_size` elements (norms, biases, sinks, the router: 0.04% of gpt-oss-20b) are trained
    as in fp32: their moments, and for bf16 ones a copy of the weights, are fp32. A larger tensor costs 2.008 bytes
    an element beside its weights, 0.008 if its moments are on the host. With in_backward its step is taken as soon
    as its gradient is there, which is then freed, so that gradients never exist together. Global-norm clipping
    would have to know all of them first: it needs in_backward=False, and gradients kept until `step`. Gradient
    accumulation works with both, and keeps gradients (as large as the weights) from one micro-batch to the next:
    set `accumulating` before all but the last.

    Args:
        params: parameters or groups of them, contiguous or made so; fp32 or bf16, on one process's device.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW; groups can differ, and a scheduler can change lr.
        seed: of the random numbers, which depend on it, the step, the tensor and the element alone.
        in_backward: steps from hooks in the backward pass; small tensors still wait for `step`.
        min_size: elements from which on a tensor's moments have 8 bits.
        stochastic_rounding: of bf16 weights; False rounds to nearest, as others do, to see what it costs.
        on_host: share of the large tensors' moments, 0 to 1, that waits in the host's pinned memory between steps and
            is copied to the device and back beside the backward pass's own work (needs in_backward): the same numbers.
        backend: of `adamw_step`.

    Bitwise reproducible where gradients are, and after a restart from `state_dict`, which holds tensors and numbers
    alone, so that torch.load(weights_only=True) reads it.

    Raises:
        TypeError: a parameter is neither fp32 nor bf16, or spread over processes (a DTensor).
        ValueError: on_host is not a share, or asked for without in_backward.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        seed: int = 0,
        in_backward: bool = False,
        min_size: int = 2**20,
        stochastic_rounding: bool = True,
        on_host: float = 0.0,
        backend: str = "auto",
    ):
        if not 0 <= on_host <= 1 or (on_host and not in_backward):
            raise ValueError(f"on_host: expected a share from 0 to 1, above 0 with in_backward only, got {on_host}")
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay))
        self.seed, self.in_backward, self.min_size = seed, in_backward, min_size
        self.stochastic_rounding, self.backend = stochastic_rounding, backend
        self.accumulating = False
        self._squares: dict[int, torch.Tensor] = {}  # of the gradients that this step has used and freed
        self._places: dict[torch.Tensor, tuple[int, int]] = {}  # group and number of each parameter
        self._handles = []
        for number_of_group, group in enumerate(self.param_groups):
            for p in group["params"]:
                if type(p.data) is not torch.Tensor or p.dtype not in (torch.float32, torch.bfloat16):
                    raise TypeError(
                        f"params: expected torch.float32 or torch.bfloat16 on one device, got {type(p.data).__name__} "
                        f"of {p.dtype}"
                    )
                p.data = p.data.contiguous()
                self._places[p] = number_of_group, len(self._places)
                if in_backward and self._large(p):
                    self._handles.append(p.register_post_accumulate_grad_hook(self._hook))

        self._host: HostMoments | None = None
        large = [p for p in self._places if self._large(p)]
        self._on_host = {large[number] for number in moved([p.numel() for p in large], on_host)}
        if self._on_host:
            self._host = HostMoments(large[0].device, max(p.numel() for p in self._on_host))

    def remove_hooks(self) -> None:
        """Lets go of the parameters: backward passes no longer take this optimizer's steps."""
        while self._handles:
            self._handles.pop().remove()

    def _large(self, p: torch.Tensor) -> bool:
        return p.numel() >= self.min_size

    def _hook(self, p: torch.Tensor) -> None:
        if self.accumulating:
            return
        if self._places[p][1] in self._squares:
            raise RuntimeError(
                "backward() ran again before step(): set optimizer.accumulating = True for all but the last "
                "micro-batch of a step"
            )
        self._apply(p)

    def _apply(self, p: torch.Tensor) -> None:
        """Steps one large tensor and frees its gradient."""
        place, number = self._places[p]
        group, state = self.param_groups[place], self.state[p]
        if not state:
            state["step"] = 0
            state.update(new_state(p, self._host.zeros if p in self._on_host else None))
        state["step"] += 1
        if p in self._on_host:
            with self._host.on_device(number, state) as here:
                self._step_large(p, number, here, group)
        else:
            self._step_large(p, number, state, group)
        p.grad = None

    def _step_large(self, p: torch.Tensor, number: int, state: dict, group: dict) -> None:
        self._squares[number] = adamw_step(
            p,
            p.grad,
            state,
            step=state["step"],
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            seed=self.seed,
            index=number,
            stochastic_rounding=self.stochastic_rounding,
            backend=self.backend,
        )

    @torch.no_grad()
    def grad_norm(self) -> torch.Tensor:
        """() fp32: the norm of all gradients of this step, those included that are used up; before `step`."""
        squares = list(self._squares.values())
        squares += [p.grad.float().square().sum() for p in self._places if p.grad is not None]
        return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())

    @torch.no_grad()
    def step(self, closure=None):
        """Steps every parameter that has a gradient; closure as in torch.optim."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            waiting = [p for p in group["params"] if p.grad is not None]
            for p in filter(self._large, waiting):
                self._apply(p)
            self._step_small([p for p in waiting if not self._large(p)], group)
        self._squares.clear()
        return loss

    def _step_small(self, parameters: list[torch.Tensor], group: dict) -> None:
        if not parameters:
            return
        for p in parameters:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=torch.float32) for _ in range(2))
                if p.dtype != torch.float32:
                    state["weight"] = p.float()
        states = [self.state[p] for p in parameters]
        weights = [state.get("weight", p) for p, state in zip(parameters, states, strict=True)]
        moments = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        beta1, beta2 = group["betas"]
        adamw(
            weights,
            [p.grad.float() for p in parameters],
            *moments,
            [],
            [state["step"] for state in states],
            fused=weights[0].is_cuda,
            foreach=False,
            amsgrad=False,
            maximize=False,
            beta1=beta1,
            beta2=beta2,
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )
        rounded = [(p, w) for p, w in zip(parameters, weights, strict=True) if w is not p]
        if rounded:
            torch._foreach_copy_(*map(list, zip(*rounded, strict=True)))

    def state_dict(self) -> dict:
        """As in torch.optim; waits for moments that are on their way to the host."""
        if self._host is not None:
            self._host.wait()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes over what `state_dict` returned; torch's own would turn codes and fp32 copies into bf16.

        Raises:
            ValueError: it is of other parameters.
        """
        groups, state = state_dict["param_groups"], state_dict["state"]
        sizes, found = ([len(group["params"]) for group in each] for each in (self.param_groups, groups))
        if sizes != found:
            raise ValueError(f"state_dict: expected groups of {sizes} parameters, got {found}")
        loaded = {}
        for own, group in zip(self.param_groups, groups, strict=True):
            for p, number in zip(own["params"], group["params"], strict=True):
                entry = state.get(number)
                if entry is None:
                    continue
                if entry["exp_avg"].numel() != p.numel() or (entry["exp_avg"].dtype == torch.uint8) != self._large(p):
                    raise ValueError(
                        f"state_dict: expected moments for {p.numel()} elements with min_size {self.min_size}, got "
                        f"{entry['exp_avg'].numel()} of {entry['exp_avg'].dtype} for parameter {number}"
                    )
                loaded[p] = {name: self._placed(p, name, value) for name, value in entry.items()}
        self.state.clear()
        self.state.update(loaded)
        for own, group in zip(self.param_groups, groups, strict=True):
            own.update({name: value for name, value in group.items() if name != "params"})
            own["betas"] = tuple(own["betas"])

    def _placed(self, p: torch.Tensor, name: str, value):
        if not isinstance(value, torch.Tensor):
            return value
        if p in self._on_host and name in MOMENTS:
            return self._host.zeros(value.numel()).copy_(value)
        return value.to(p.device)
