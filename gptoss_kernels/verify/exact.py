"""gpt-oss written out once more, from the model's weights and the two references alone: what a stack is compared with.

Nothing here goes through Transformers' layers, this package's kernels or PEFT. In fp64 (fp32 for large models) it is
the truth; in the stack's own dtype it shows how far plain PyTorch rounds, which is what the limits are made of.
"""

import torch
from torch.nn.functional import linear, log_softmax

from ..attention.reference import attention_concat, attention_reference
from ..experts.reference import ExpertsLoRA, experts_reference
from ..mxfp4.reference import dequantize


class Exact:
    """The stack's model in another dtype, one document at a time.

    Args:
        model: a GptOssForCausalLM of Transformers, bare or inside PEFT, with plain LoRA at most.
        dtype: of everything that is computed. In fp64 and fp32 attention spells out the normaliser, in half precision
            it rounds as eager attention does.
    """

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype):
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config, self.dtype = self.model.config, dtype
        self.alpha = getattr(self.config, "swiglu_alpha", 1.702)
        self.limit = getattr(self.config, "swiglu_limit", 7.0)
        self._named = dict(model.named_parameters())
        self._leaves: dict[int, torch.Tensor] = {}
        self.refresh()

    def refresh(self, parameters=None) -> None:
        """Reads these parameters again, all by default."""
        for p in self._named.values() if parameters is None else parameters:
            self._leaves[id(p)] = p.detach().to(self.dtype).requires_grad_(p.requires_grad)

    def __call__(self, parameter: torch.Tensor) -> torch.Tensor:
        return self._leaves[id(parameter)]

    def hidden(self, ids: torch.Tensor, routing: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The final norm's result for one document alone.

        Args:
            ids: (tokens,) int64.
            routing: a layer's experts, (tokens, top_k) each.

        Returns:
            (tokens, hidden), and a layer's router logits, (tokens, experts) each.
        """
        body, logits = self.model.model, []
        positions = torch.arange(len(ids), device=ids.device)[None]
        cos, sin = (x[0].to(self.dtype) for x in body.rotary_emb(torch.empty(1, device=ids.device), positions))
        x = self(body.embed_tokens.weight)[ids]
        for layer, kind, indices in zip(body.layers, self.config.layer_types, routing, strict=True):
            window = self.config.sliding_window if kind == "sliding_attention" else None
            x = x + self._attention(layer.self_attn, self._norm(layer.input_layernorm, x), cos, sin, window)
            y = self._norm(layer.post_attention_layernorm, x)
            weight, bias = self._router(layer.mlp.router)
            logits.append(linear(y, weight, bias))
            shares = logits[-1].gather(1, indices).softmax(-1)
            x = x + self.experts(layer.mlp.experts, y, indices, shares)
        return self._norm(body.norm, x), logits

    def losses(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """-log p of each label (tokens,) given the hidden state (tokens, hidden) that predicts it."""
        logits = linear(hidden, self(self.model.lm_head.weight)).to(torch.promote_types(self.dtype, torch.float32))
        return -log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]

    def gradients(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of every trained parameter, by its name in the model; zeros where the loss does not depend on it."""
        trained = {name: self(p) for name, p in self._named.items() if p.requires_grad}
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(trained.items(), found, strict=True)
        }

    def experts(self, module, x, indices, shares, alpha: float | None = None, limit: float | None = None):
        """Experts with their adapters, (tokens, hidden) to (tokens, hidden)."""
        adapters = {}
        while hasattr(module, "base_layer"):
            adapters[module.parameter_name.replace("proj", "lora")] = self._experts_lora(module)
            module = module.base_layer
        compute = experts_reference if self.dtype in (torch.float64, torch.float32) else _experts_rounded
        return compute(
            x,
            *(self._projection(module, name) for name in ("gate_up_proj", "gate_up_proj_bias")),
            *(self._projection(module, name) for name in ("down_proj", "down_proj_bias")),
            indices,
            shares,
            alpha=self.alpha if alpha is None else alpha,
            limit=self.limit if limit is None else limit,
            **adapters,
        )

    def peak(self, module, x: torch.Tensor) -> float:
        """Largest magnitude of any expert's pre-activation for these tokens (tokens, hidden)."""
        while hasattr(module, "base_layer"):
            module = module.base_layer
        weights, biases = (self._projection(module, name) for name in ("gate_up_proj", "gate_up_proj_bias"))
        return max((x.to(self.dtype) @ w + b).abs().max().item() for w, b in zip(weights, biases, strict=True))

    def _norm(self, module, x):
        work = x.to(torch.promote_types(self.dtype, torch.float32))
        normal = work * torch.rsqrt(work.square().mean(-1, keepdim=True) + module.variance_epsilon)
        return (self(module.weight) * normal).to(self.dtype)

    def _attention(self, module, x, cos, sin, window):
        q, k, v = (
            linear(x, *self._linear(proj)).unflatten(-1, (-1, module.head_dim)).transpose(0, 1)  # [heads, tokens, dim]
            for proj in (module.q_proj, module.k_proj, module.v_proj)
        )
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        exact = self.dtype in (torch.float64, torch.float32)
        attend, keywords = (attention_reference, {}) if exact else (attention_concat, {"compute_dtype": self.dtype})
        out, _ = attend(q[None], k[None], v[None], self(module.sinks), sliding_window=window, **keywords)
        return linear(out[0].transpose(0, 1).flatten(1), *self._linear(module.o_proj))

    def _linear(self, module):
        """(weight, bias) of a linear layer, its adapter in the weight."""
        if not hasattr(module, "lora_A"):
            return self(module.weight), None if module.bias is None else self(module.bias)
        weight, bias = self._linear(module.base_layer)
        (name,) = module.lora_A
        return weight + self._delta(module, name), bias

    def _router(self, module):
        if not hasattr(module, "lora_A"):
            return self(module.weight), self(module.bias)
        weight, bias = self._router(module.base_layer)
        (name,) = module.lora_A
        return weight + self._delta(module, name), bias

    def _delta(self, module, name):
        return module.scaling[name] * self(module.lora_B[name].weight) @ self(module.lora_A[name].weight)

    def _experts_lora(self, module) -> ExpertsLoRA:
        """PEFT stores A as (experts * rank, in), expert by expert, and B as (out, rank * experts), rank by rank."""
        (name,) = module.lora_A
        a, b = self(module.lora_A[name].weight), self(module.lora_B[name].weight)
        a = a.unflatten(0, (module.num_experts, -1))
        return ExpertsLoRA(a, b.unflatten(1, (-1, module.num_experts)).permute(2, 0, 1), module.scaling[name])

    def _projection(self, experts, name: str) -> torch.Tensor:
        weight = getattr(experts, name)
        if isinstance(weight, torch.Tensor):
            return self(weight)
        return dequantize(weight.blocks, weight.scales, torch.float32).to(self.dtype)  # packed, exact in fp32


def _experts_rounded(
    x, w1, b1, w2, b2, indices, shares, *, alpha, limit, gate_up_lora=None, down_lora=None
) -> torch.Tensor:
    """`experts_reference` with every product rounded to x's dtype, as eager experts round: at the clamp it matters."""

    def product(value, weight, lora, expert):
        result = value @ weight[expert]
        if lora is not None:
            result = result + lora.scaling * (value @ lora.a[expert].T) @ lora.b[expert].T
        return result

    out = torch.zeros_like(x)
    for expert in range(len(w1)):
        share = torch.where(indices == expert, shares, 0).sum(-1, keepdim=True)  # [tokens, 1]
        hidden = product(x, w1, gate_up_lora, expert) + b1[expert]
        gate, up = hidden[:, 0::2].clamp(max=limit), hidden[:, 1::2].clamp(-limit, limit)
        act = (up + 1) * gate * torch.sigmoid(alpha * gate)
        out = out + share * (product(act, w2, down_lora, expert) + b2[expert])
    return out


def _rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
