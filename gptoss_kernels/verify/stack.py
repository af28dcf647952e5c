"""The model under test: runs it as the trainer does, and looks at routing, hidden states and gradients on the way."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssModel, GptOssTopKRouter

from ..finetune.packing import Collator
from ..finetune.recompute import Recomputation
from ..testing import relative_error
from .combination import LARGE, Combination
from .exact import Exact


@dataclass
class Record:
    """What was seen during one forward pass, and the recomputation that its backward pass may have made.

    routing: a layer, a call: the chosen experts (tokens, top_k). hidden: of the final norm, (batch, length, hidden).
    attention: a layer: what its attention was called with. output: the model's.
    """

    routing: list[list[torch.Tensor]]
    hidden: torch.Tensor | None = None
    attention: list[dict] = field(default_factory=list)
    output: object = None

    def chosen(self) -> list[torch.Tensor]:
        """A layer's experts in the forward pass."""
        return [calls[0] for calls in self.routing]


@dataclass
class Step(Record):
    """A training step: also the loss, its gradient by hidden state, and of every trained parameter by name."""

    loss: float = float("nan")
    hidden_gradient: torch.Tensor | None = None
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


class Stack:
    """A combination's model, and the documents that it is run on.

    Rounding moves a token between experts that are nearly equal, and then nothing can be compared. So each document is
    run alone once with its own choice of experts, and that choice is imposed wherever the same document is run again.
    """

    def __init__(self, combination: Combination):
        self.combination, self.trainer = combination, combination.trainer
        self.model, self.device = self.trainer.model, self.trainer.args.device
        self.body = next(m for m in self.model.modules() if isinstance(m, GptOssModel))
        self.config = self.body.config
        self.layers = list(self.body.layers)
        self.routers = [m for m in self.body.modules() if isinstance(m, GptOssTopKRouter)]
        self.attentions = [layer.self_attn for layer in self.layers]
        training = combination.arguments.training
        self.dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else self.body.dtype
        large = sum(p.numel() for p in self.model.parameters()) > LARGE and self.dtype != torch.float32
        self.exact = Exact(self.model, torch.float32 if large else torch.float64)
        self.eager = Exact(self.model, self.dtype)
        self.pad = self.trainer.processing_class.pad_token_id
        self.recomputation = next(
            (c for c in self.trainer.callback_handler.callbacks if isinstance(c, Recomputation)), None
        )
        self.trainer.current_gradient_accumulation_steps = 1  # as Trainer's loop sets it; TRL asks for it
        self.documents = combination.documents
        self.ids = [torch.from_numpy(d.input_ids).long().to(self.device) for d in self.documents]
        self.checkpointing("off")

        #: a document: its final hidden states (tokens, hidden) when it is alone, and a layer's chosen experts
        self.alone: list[torch.Tensor] = []
        self.routing: list[list[torch.Tensor]] = []
        for ids in self.ids:
            record = self.forward(ids[None], attention_mask=torch.ones_like(ids)[None])
            self.alone.append(record.hidden[0])
            self.routing.append(record.chosen())
        with torch.no_grad():
            self.truth, self.router_logits = zip(*map(self.exact.hidden, self.ids, self.routing), strict=True)
            rounded = [self.eager.hidden(*pair)[0] for pair in zip(self.ids, self.routing, strict=True)]
        #: relative error of plain PyTorch in this dtype, whose multiple is what hidden states may differ by
        self.rounding = max(map(relative_error, rounded, self.truth))

    # ------------------------------------------------------------------------------------------------------- limits

    @property
    def floor(self) -> float:
        """The least that a limit is."""
        return max(2 * torch.finfo(self.dtype).eps, 1e-5)

    def limit(self, rounding: float) -> float:
        """What a relative error may be where plain PyTorch in the same dtype has `rounding`."""
        return 2 * rounding + self.floor

    # --------------------------------------------------------------------------------------------------------- runs

    def forward(self, ids: torch.Tensor, *, routing=None, train: bool = True, **inputs) -> Record:
        """Hidden states of token ids (batch, length), without a loss and without gradients.

        Args:
            routing: see `watch`.
            train: the model's mode.
            inputs: as the model takes them.
        """
        self.model.train(train)
        with torch.no_grad(), self.trainer.accelerator.autocast(), self.watch(routing) as record:
            record.output = self.model(input_ids=ids, **{"use_cache": False, **inputs})
        return record

    def step(self, batch: dict, routing=None) -> Step:
        """Loss and gradients of a collator's batch, by the trainer's own `compute_loss`."""
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        batch = self.trainer._prepare_inputs(dict(batch))
        total = batch["loss_weights"].sum()
        with self.watch(routing) as record:
            with self.trainer.compute_loss_context_manager(), self.trainer.accelerator.autocast():
                loss = self.trainer.compute_loss(self.model, batch, num_items_in_batch=total)
            loss.backward()
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }
        gradient = record.hidden.grad
        self.model.zero_grad(set_to_none=True)
        return Step(
            record.routing,
            record.hidden.detach(),
            loss=loss.item(),
            hidden_gradient=gradient,
            gradients=gradients,
        )

    @contextlib.contextmanager
    def watch(self, routing: list[torch.Tensor] | None = None) -> Iterator[Record]:
        """Records what happens.

        Args:
            routing: a layer's experts, imposed on it: (tokens, top_k), -1 where it may choose. None: it chooses all.
        """
        record = Record([[] for _ in self.routers])
        hooks = [self.body.norm.register_forward_hook(lambda module, args, output: see(output))]

        def see(output):
            record.hidden = output
            if output.requires_grad:
                output.retain_grad()

        def route(layer):
            def hook(module, args, output):
                logits, shares, indices = output
                if routing is not None:
                    wanted = routing[layer].to(indices.device)
                    indices = torch.where(wanted >= 0, wanted, indices)
                    shares = logits.gather(1, indices).softmax(-1, dtype=shares.dtype)
                record.routing[layer].append(indices.detach().clone())
                return logits, shares, indices

            return hook

        hooks += [router.register_forward_hook(route(layer)) for layer, router in enumerate(self.routers)]
        hooks += [
            attention.register_forward_pre_hook(
                lambda module, args, kwargs: record.attention.append(kwargs), with_kwargs=True
            )
            for attention in self.attentions
        ]
        try:
            yield record
        finally:
            for hook in hooks:
                hook.remove()

    def checkpointing(self, mode: str) -> None:
        """ "off"; "lean": layers are computed again but for their routing; "fast": attention's and experts' results are
        kept too, where this package's recomputation is used."""
        self.model.gradient_checkpointing_disable()
        if mode == "off":
            return
        self.model.gradient_checkpointing_enable(self.trainer.args.gradient_checkpointing_kwargs)
        if self.recomputation is not None:
            count = len(self.layers) if mode == "fast" else 0
            self.recomputation.apply(count, count)

    # ----------------------------------------------------------------------------------------------------- adapters

    def adapters(self) -> dict[str, list[torch.nn.Parameter]]:
        """LoRA's B matrices, by the projection that they adapt."""
        kinds: dict[str, list] = {}
        for name, module in self.model.named_modules():
            if hasattr(module, "lora_B") and len(module.lora_B):
                kind = getattr(module, "parameter_name", None) or name.rpartition(".")[2]
                kind = "router" if kind == "weight" else kind
                kinds.setdefault(kind, []).extend(x.weight for x in module.lora_B.values())
        return kinds

    @contextlib.contextmanager
    def only(self, kind: str | None) -> Iterator[None]:
        """Within it, every adapter but those of this kind is zero, in the model and where it is written out."""
        others = [b for name, blocks in self.adapters().items() if name != kind for b in blocks]
        saved = [b.detach().clone() for b in others]

        def put(values) -> None:
            for b, value in zip(others, values, strict=True):
                b.data.copy_(value)
            for exact in (self.exact, self.eager):
                exact.refresh(others)

        put(map(torch.zeros_like, saved))
        try:
            yield
        finally:
            put(saved)

    # ------------------------------------------------------------------------------------------- batches of documents

    def rows(self) -> list[dict]:
        return [
            {"input_ids": d.input_ids, "loss_weights": d.loss_weights, "seq_lengths": [len(d.input_ids)]}
            for d in self.documents
        ]

    def packed(self) -> tuple[dict, list[torch.Tensor]]:
        """All documents joined, as the trainer's collator joins them, and their routing."""
        return Collator(self.pad, True)(self.rows()), [torch.cat(parts) for parts in zip(*self.routing, strict=True)]

    def padded(self, side: str = "right") -> tuple[dict, list[torch.Tensor]]:
        """All documents padded on one side, and their routing."""
        batch = Collator(self.pad, False)(self.rows())
        if side == "left":
            for name, x in batch.items():
                batch[name] = torch.stack([
                    row.roll(x.shape[1] - len(ids)) for row, ids in zip(x, self.ids, strict=True)
                ])  # fmt: skip
        length = batch["input_ids"].shape[1]

        def pad(indices: torch.Tensor) -> torch.Tensor:
            space = length - len(indices)
            where = (0, 0, space, 0) if side == "left" else (0, 0, 0, space)
            return torch.nn.functional.pad(indices, where, value=-1)

        return batch, [torch.cat([pad(x) for x in parts]) for parts in zip(*self.routing, strict=True)]

    def own(self) -> tuple[dict, list[torch.Tensor]]:
        """All documents in the form in which the run has them."""
        return self.packed() if self.combination.joined else self.padded()

    def split(self, hidden: torch.Tensor, side: str = "right") -> list[torch.Tensor]:
        """Hidden states of a batch of all documents, a document each, without padding."""
        lengths = [len(ids) for ids in self.ids]
        if hidden.shape[0] == 1:
            return list(hidden[0].split(lengths))
        return [row[len(row) - n :] if side == "left" else row[:n] for row, n in zip(hidden, lengths, strict=True)]
