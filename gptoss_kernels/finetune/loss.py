"""This package's loss in the place where TRL's trainer asks for its own."""

import functools
import types

import torch
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from ..backends import default_backend


def fuse_loss(model: PreTrainedModel) -> None:
    """Lets `model(..., labels=…, fused_lm_head=True)`, as TRL's trainer calls it, use this package's loss.

    Two matrix products over the vocabulary instead of three. Calls that it does not serve (a trained LM head, the
    router's auxiliary loss, labels that are shifted already, a backend that is not Triton) go to TRL's own.

    Args:
        model: a GptOssForCausalLM that TRL's `add_fused_lm_head` has prepared.
    """
    trl_forward = model.forward

    @functools.wraps(trl_forward)
    def forward(self, *args, fused_lm_head=False, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs):
        head = self.get_output_embeddings()
        if (
            not fused_lm_head
            or labels is None
            or shift_labels is not None
            or kwargs.get("output_router_logits", getattr(self.config, "output_router_logits", False))
            or type(head.weight) is not torch.nn.Parameter
            or head.weight.requires_grad
            or head.weight.numel() == 0  # ZeRO-3 has it elsewhere
            or head.bias is not None
            or default_backend(head.weight) != "triton"
        ):
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            given = {name: value for name, value in given.items() if value is not None}
            return trl_forward(*args, fused_lm_head=fused_lm_head, **given, **kwargs)
        from ..layers.loss import linear_cross_entropy

        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        labels = labels[:, 1:]
        mask = labels != -100
        kept = mask.flatten().nonzero().squeeze(-1)  # the one host sync of a step's forward pass
        rows = hidden.flatten(0, 1)[kept].to(head.weight.dtype)
        per_token = linear_cross_entropy(rows, head.weight, labels.flatten()[kept])
        losses, entropy, top1 = (x.new_zeros(mask.numel()).index_put((kept,), x).view_as(mask) for x in per_token)
        items = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return FusedCausalLMOutput(
            loss=losses.sum() / items, log_probs=-losses, entropy=entropy, is_top1=top1, label_mask=mask
        )

    model.forward = types.MethodType(forward, model)
