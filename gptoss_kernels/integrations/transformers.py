"""gpt-oss attention inside Transformers: `attn_implementation="gptoss_triton"`, and patches for eager models.

`attn_implementation="gptoss_fa4"` is the same through FlashAttention-4 (see `flash_attention`, backend="fa4"), which
knows no padding: masks of ones are read as none, also while decoding token by token, and padding raises.

Which tokens see each other, besides causality and the layer's window:

1. `cu_seq_lens_q` and `cu_seq_lens_k` (TRL's collator, Transformers' DataCollatorWithFlattening) are the documents of a
   packed row. With an attention_mask that has padding they raise.
2. An attention_mask with padding hides the padded keys, and position_ids do not decide anything. Should the positions
   of the real tokens restart nevertheless, the row is both padded and packed: that raises, it never leaks.
3. Without padding (no mask, or all ones) position_ids that restart within a row are packed documents, kept apart. More
   than one row, a filled cache, or positions that jump forward raise. Any constant offset is no packing.

The values of masks and positions are read once a forward, at the first layer that meets a tensor, and the answer is
kept beside that tensor: a gradient-checkpointing recomputation, whose tensors are the same, reads nothing again. On a
GPU such a reading is a synchronisation: one for position_ids or cu_seq_lens, and with an attention_mask one for each
of the two layer kinds, whose masks are two tensors; none while decoding token by token, and none a layer. No matrix of
length x length is built on any of these paths.

A cache that a packed row has filled must not be decoded from: a query alone cannot tell the documents behind it.
"""

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..attention.api import flash_attention
from ..backends import default_backend
from ..experts.api import fused_experts
from .register import after_import

NAME = "gptoss_triton"
FA4_NAME = "gptoss_fa4"
STATIC_CACHE = (
    'a static cache (cache_implementation="static" and its kin) holds keys that are not filled yet; use the default '
    "dynamic cache"
)
FA4_PADDING = (
    f'attention_mask: attn_implementation="{FA4_NAME}" expected None or all ones, got padding, which FlashAttention-4 '
    "cannot mask; pack the rows (packing or padding_free, cu_seq_lens_q and cu_seq_lens_k), generate for one prompt at "
    f'a time, or use attn_implementation="{NAME}"'
)
DENSE_MASK = (
    "attention_mask: expected a dense mask of 0 and the dtype's minimum that means causality, the layer's window and "
    "padding, or besides them the documents in position_ids; got one that means something else"
)


# ---------------------------------------------------------------------------------------------- attention functions


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    attend: Callable | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The attention function behind `attn_implementation="gptoss_triton"`, in Transformers' signature.

    Args:
        module: the attention layer; its `sinks` are used where s_aux is not given.
        query: (batch, q_heads, q_len, head_dim).
        key, value: (batch, kv_heads, kv_len, head_dim), the cached ones included; q_len < kv_len while decoding.
        attention_mask: (batch, kv_len), True or 1 where a key is a real token, or None.
        scaling, sliding_window: as in `gptoss_kernels.flash_attention`.
        dropout: must be 0.
        s_aux: (q_heads,), the sinks.
        position_ids: (batch or 1, q_len).
        cu_seq_lens_q, cu_seq_lens_k: (documents + 1,) integers, equal to each other.
        attend: what computes it; default `gptoss_kernels.flash_attention`.
        kwargs: what Transformers passes besides; max_length_q and the like are not needed.

    Returns:
        (out, None): out is (batch, q_len, q_heads, head_dim), contiguous. Attention weights are never formed.

    Raises:
        ValueError: a setting that this function cannot follow exactly; the message names it.
    """
    _check_settings(module, dropout, kwargs)
    sinks = getattr(module, "sinks", None) if s_aux is None else s_aux
    padding, cu_seqlens = _visibility(module, query, key, attention_mask, position_ids, cu_seq_lens_q, cu_seq_lens_k)
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        # The rotary embedding leaves q and k in fp32 there, and v in the autocast dtype.
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    with torch.autocast(device_type, enabled=False):
        out = (attend or flash_attention)(
            query,
            key,
            value,
            sinks,
            scale=scaling,
            sliding_window=sliding_window,
            cu_seqlens=cu_seqlens,
            key_padding_mask=padding,
        )
    return out.transpose(1, 2), None


def fa4_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The attention function behind `attn_implementation="gptoss_fa4"`: `attention_forward` through FlashAttention-4.

    Args, Returns: see `attention_forward`.

    Raises:
        ValueError: attention_mask hides a key, or a setting that cannot be followed exactly; the message names it.
        RuntimeError, TypeError: FlashAttention-4 is not installed, or cannot compute on this GPU or in this dtype.
    """
    if attention_mask is not None:
        _check_mask_shape(attention_mask, query.shape[0], key.shape[2])
        if torch.compiler.is_compiling():
            torch._assert_async(attention_mask.bool().all(), FA4_PADDING)
        elif _once_a_forward(module, attention_mask, (None,), (), lambda: _read_padding(attention_mask, None)):
            raise ValueError(FA4_PADDING)
    attend = functools.partial(flash_attention, backend="fa4")
    return attention_forward(module, query, key, value, None, scaling, dropout, attend=attend, **kwargs)


def triton_flash_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention for `modeling_gpt_oss.eager_attention_forward = triton_flash_attention`, in its signature.

    Transformers then still builds eager's dense masks, (batch, 1, q_len, kv_len), 0 where a key is seen and the dtype's
    minimum elsewhere (bool: True where seen). Padding is read from such a mask, documents from position_ids, and the
    mask must equal what causality, the layer's window, padding and, if it has them, documents imply; this is checked
    once a forward. `patch_flash_attention` spares both the building and the reading. Everything else is as in
    `attn_implementation="gptoss_triton"`.

    Args, Returns: see `attention_forward`.

    Raises:
        ValueError: the mask means something else, or a setting that cannot be followed exactly; the message names it.
    """
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4:
        attention_mask = _read_dense_mask(module, attention_mask, query, key, kwargs)
    return attention_forward(module, query, key, value, attention_mask, scaling, dropout, **kwargs)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **kwargs,
) -> torch.Tensor | None:
    """The mask function behind "gptoss_triton" and "gptoss_fa4": the padding mask cut to a layer's keys.

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset: sizes, and positions of the first query and key.
        mask_function, allow_is_causal_skip, use_vmap: how Transformers describes the pattern; looked at for overlays.
        attention_mask: (batch, seen tokens) bool, or None.

    Returns:
        (batch, kv_length) bool, a view of attention_mask, or None without one.

    Raises:
        ValueError: the pattern is not plain causal or sliding-window, the cache is static, or the mask is too short.
    """
    name = getattr(kwargs.get("config"), "_attn_implementation", NAME)
    if use_vmap or "allow_is_bidirectional_skip" in kwargs or _is_union(mask_function):
        raise ValueError(
            f'attn_implementation="{name}": expected causal or sliding-window attention, got a mask overlay '
            "(or_mask_function, and_mask_function, block_sequence_ids) or bidirectional attention (is_causal=False)"
        )
    if isinstance(q_offset, torch.Tensor) or (attention_mask is None and q_offset + q_length != kv_offset + kv_length):
        raise ValueError(f'attn_implementation="{name}": {STATIC_CACHE}')
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch_size:
        raise ValueError(
            f"attention_mask: expected shape (batch={batch_size}, tokens), got {tuple(attention_mask.shape)}"
        )
    tokens = q_offset + q_length
    if kv_offset + kv_length != tokens and attention_mask.shape[1] == tokens:
        raise ValueError(f'attn_implementation="{name}": {STATIC_CACHE}')
    if kv_offset + kv_length != tokens or attention_mask.shape[1] < tokens:
        raise ValueError(
            f"attention_mask: expected (batch, {tokens}), a column for each token seen so far, cached ones included; "
            f"got {tuple(attention_mask.shape)}"
        )
    return attention_mask[:, kv_offset:tokens]


# --------------------------------------------------------------------------------------------------------- experts


def experts_forward(
    module: torch.nn.Module,
    hidden_states: torch.Tensor,
    router_indices: torch.Tensor,
    routing_weights: torch.Tensor,
    **adapters,
) -> torch.Tensor:
    """The experts function behind `experts_implementation="gptoss_triton"`, in Transformers' signature.

    Where Triton does not run (see `fused_experts`, backend="auto"), Transformers' own grouped_mm computes the same.

    Args:
        module: gpt-oss's experts, with its four parameters, alpha and limit.
        hidden_states: (tokens, hidden).
        router_indices, routing_weights: (tokens, top_k); an index equal to the number of experts is skipped.
        adapters: gate_up_lora and down_lora, as `fused_experts` takes them, where Triton runs.

    Returns:
        (tokens, hidden).

    Raises:
        ValueError: module is not gpt-oss's experts: their layout and activation are not what is computed here.
    """
    layout = [getattr(module, name, None) for name in ("is_transposed", "is_concatenated", "has_bias")]
    if layout != [True, False, True] or not (hasattr(module, "alpha") and hasattr(module, "limit")):
        raise ValueError(
            f'experts_implementation="{NAME}": expected gpt-oss\'s experts (interleaved gate and up columns, biases, '
            f"clamped SwiGLU), got {type(module).__name__}"
        )
    if default_backend(hidden_states) != "triton":
        # Every expert on every token would be the definition, not a way to train.
        from transformers.integrations.moe import grouped_mm_experts_forward

        return grouped_mm_experts_forward(module, hidden_states, router_indices, routing_weights)
    return fused_experts(
        hidden_states,
        module.gate_up_proj,
        module.gate_up_proj_bias,
        module.down_proj,
        module.down_proj_bias,
        router_indices,
        routing_weights,
        alpha=module.alpha,
        limit=module.limit,
        **adapters,
    )


# ------------------------------------------------------------------------------------------ registering and patching


def register() -> None:
    """Registers "gptoss_triton" with Transformers' attention, mask and experts interfaces, "gptoss_fa4" with two."""
    from transformers.integrations.moe import ExpertsInterface
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, padding_mask)
    AttentionInterface.register(FA4_NAME, fa4_attention_forward)
    AttentionMaskInterface.register(FA4_NAME, padding_mask)
    ExpertsInterface.register(NAME, experts_forward)


def register_when_loaded() -> None:
    """Registers as soon as Transformers' modeling code is imported, now if it is."""
    after_import("transformers.modeling_utils", register)


_originals: dict[str, Callable] = {}


def patch_flash_attention(model: torch.nn.Module | None = None) -> None:
    """Replaces eager attention of every gpt-oss model in this process, existing ones included.

    `modeling_gpt_oss.eager_attention_forward` becomes this package's attention, and for eager models the two mask
    builders of that module hand the 2-D padding mask through instead of building length x length masks. Models with
    another attn_implementation keep it. Calling it again changes nothing.

    Args:
        model: optional; checked to be one that the patch reaches.

    Raises:
        ValueError: model has no gpt-oss attention, or its attn_implementation is not "eager".
    """
    from transformers.models.gpt_oss import modeling_gpt_oss as modeling

    if model is not None:
        layers = [m for m in model.modules() if isinstance(m, modeling.GptOssAttention)]
        if not layers:
            raise ValueError(f"model: expected a gpt-oss model, got {type(model).__name__} without GptOssAttention")
        implementation = layers[0].config._attn_implementation
        if implementation not in (None, "eager", NAME):
            raise ValueError(
                f'model: expected attn_implementation="eager", which the patch replaces, got {implementation!r}; '
                'call model.set_attn_implementation("eager") first'
            )
    if _originals:
        return
    register()
    _originals["eager_attention_forward"] = modeling.eager_attention_forward
    modeling.eager_attention_forward = attention_forward
    for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
        _originals[name] = getattr(modeling, name)
        setattr(modeling, name, _without_dense_mask(_originals[name]))


def unpatch_flash_attention() -> None:
    """Puts back exactly what `patch_flash_attention` replaced; without a patch it changes nothing."""
    if not _originals:
        return
    from transformers.models.gpt_oss import modeling_gpt_oss as modeling

    for name, original in _originals.items():
        setattr(modeling, name, original)
    _originals.clear()


class _RoutedConfig:
    """A model's configuration that says "gptoss_triton", so that Transformers' builders call `padding_mask`."""

    _attn_implementation = NAME

    def __init__(self, config):
        self._config = config

    def __getattr__(self, name):
        return getattr(self._config, name)


def _without_dense_mask(build: Callable) -> Callable:
    @functools.wraps(build)
    def build_padding_mask(config, *args, **kwargs):
        eager = config._attn_implementation in (None, "eager")
        return build(_RoutedConfig(config) if eager else config, *args, **kwargs)

    return build_padding_mask


# ------------------------------------------------------------------------------------------------------------ checks


def _check_settings(module, dropout, kwargs) -> None:
    config = getattr(module, "config", None)
    if dropout:
        raise ValueError(f"attention_dropout: expected 0, the kernels have no dropout; got {dropout}")
    if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
        raise ValueError(
            "output_attentions: expected False, the kernels never form attention weights; got True "
            '(use attn_implementation="eager" to see them)'
        )
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError("is_causal: expected True, got False")
    if kwargs.get("softcap"):
        raise ValueError(f"softcap: expected None, got {kwargs['softcap']}")


def _is_union(mask_function) -> bool:
    # Transformers' or_masks alone lets a query see what causality hides; block_sequence_ids come through it too, and
    # without use_vmap. By name, which torch.compile can follow.
    return getattr(mask_function, "__name__", None) == "or_mask"


def _visibility(module, query, key, attention_mask, position_ids, cu_seq_lens_q, cu_seq_lens_k):
    """(key_padding_mask, cu_seqlens) for flash_attention: at most one of them is not None."""
    batch, _, q_len, _ = query.shape
    kv_len = key.shape[2]
    if attention_mask is not None:
        _check_mask_shape(attention_mask, batch, kv_len)
    if position_ids is not None and (
        position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != q_len
    ):
        raise ValueError(
            f"position_ids: expected shape ({batch} or 1, {q_len}), a position for each query, "
            f"got {tuple(position_ids.shape)}"
        )
    tracing = torch.compiler.is_compiling()

    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        _check_packed(cu_seq_lens_q, cu_seq_lens_k, batch, q_len, kv_len)
        if attention_mask is not None:
            message = "attention_mask: expected None or all ones together with cu_seq_lens_q, got padding"
            if tracing:
                torch._assert_async(attention_mask.bool().all(), message)
            elif _once_a_forward(module, attention_mask, (None,), (), lambda: _read_padding(attention_mask, None)):
                raise ValueError(message)
        if tracing:
            if cu_seq_lens_k is not cu_seq_lens_q:
                torch._assert_async(
                    (cu_seq_lens_q == cu_seq_lens_k).all(), "cu_seq_lens_k: expected cu_seq_lens_q's values"
                )
            return None, cu_seq_lens_q.to(query.device, torch.int32)
        return None, _once_a_forward(
            module,
            cu_seq_lens_q,
            (cu_seq_lens_k,),
            (q_len, query.device),
            lambda: _read_cu_seq_lens(cu_seq_lens_q, cu_seq_lens_k, q_len, query.device),
        )

    if q_len == 1:  # one query a row cannot be packed: nothing to read
        return None if attention_mask is None else attention_mask.bool(), None
    if tracing:
        if position_ids is not None:
            torch._assert_async(
                ~_breaks(position_ids, attention_mask).any(),
                "position_ids: packed documents under torch.compile are not found from positions that restart; pass "
                "cu_seq_lens_q and cu_seq_lens_k",
            )
        return None if attention_mask is None else attention_mask.bool(), None
    if attention_mask is not None:
        padded = _once_a_forward(
            module, attention_mask, (position_ids,), (), lambda: _read_padding(attention_mask, position_ids)
        )
        if padded:
            return attention_mask.bool(), None
    if position_ids is None:
        return None, None
    return None, _once_a_forward(
        module,
        position_ids,
        (),
        (batch, q_len == kv_len, query.device),
        lambda: _read_documents(position_ids, batch, q_len == kv_len, query.device),
    )


def _check_mask_shape(mask, batch, kv_len) -> None:
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"attention_mask: expected a torch.Tensor or None, got {type(mask).__name__}")
    if mask.dim() == 4:
        raise ValueError(
            f"attention_mask: expected a 2-D padding mask (batch, tokens) or None, got a 4-D mask {tuple(mask.shape)}: "
            "custom masks cannot be followed. generate() prepares one for a static cache: "
            'cache_implementation="static" is not supported, use the default dynamic cache'
        )
    if mask.shape != (batch, kv_len):
        raise ValueError(
            f"attention_mask: expected shape (batch={batch}, kv_len={kv_len}), the keys of this layer, "
            f"got {tuple(mask.shape)}"
        )


def _check_packed(cu_seq_lens_q, cu_seq_lens_k, batch, q_len, kv_len) -> None:
    for name, x in (("cu_seq_lens_q", cu_seq_lens_q), ("cu_seq_lens_k", cu_seq_lens_k)):
        if not isinstance(x, torch.Tensor) or x.is_floating_point():
            got = f"a {x.dtype} tensor" if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"{name}: expected an integer tensor (cu_seq_lens_q and _k come together), got {got}")
    if cu_seq_lens_q.dim() != 1 or cu_seq_lens_q.shape[0] < 2 or cu_seq_lens_q.shape != cu_seq_lens_k.shape:
        raise ValueError(
            f"cu_seq_lens_q, cu_seq_lens_k: expected shape (documents + 1,) for both, got "
            f"{tuple(cu_seq_lens_q.shape)} and {tuple(cu_seq_lens_k.shape)}"
        )
    if batch != 1:
        raise ValueError(f"cu_seq_lens_q: expected batch 1, all documents packed into one row; got batch {batch}")
    if q_len != kv_len:
        raise ValueError(
            f"cu_seq_lens_q: expected as many keys as queries (no filled past_key_values), "
            f"got q_len={q_len} and kv_len={kv_len}"
        )


# ------------------------------------------------------------------------- reading values, once a forward and tensor


@dataclass
class _Reading:
    inputs: tuple[weakref.ref | None, ...]
    versions: tuple[int | None, ...]
    facts: tuple
    layer: int
    value: Any


_readings = WeakTensorKeyDictionary()  # tensor -> _Reading; not an attribute, which torch.save would try to pickle


def _once_a_forward(module, owner, others, facts, read: Callable[[], Any]) -> Any:
    """read()'s result, kept beside the tensor `owner` for as long as it, the tensors `others` and `facts` are the same.

    A write in place moves a tensor's version, which inference tensors do not have: there a reading serves the
    following layers only, so that a second forward, which starts at a lower layer, reads again.
    """
    tensors = (owner, *others)
    versions = tuple(None if x is None or x.is_inference() else x._version for x in tensors)
    inference = any(x is not None and x.is_inference() for x in tensors)
    layer = getattr(module, "layer_idx", None) or 0
    kept = _readings.get(owner)
    if (
        kept is not None
        and kept.versions == versions
        and kept.facts == facts
        and len(kept.inputs) == len(others)
        and all((None if ref is None else ref()) is x for ref, x in zip(kept.inputs, others, strict=True))
        and (not inference or kept.layer < layer)
    ):
        kept.layer = layer
        return kept.value
    value = read()
    references = tuple(None if x is None else weakref.ref(x) for x in others)
    _readings[owner] = _Reading(references, versions, facts, layer, value)
    return value


def _breaks(position_ids, mask) -> torch.Tensor:
    """(batch, q_len) bool: real tokens whose position neither follows that of the real token before by one nor by
    their distance in the row (a hole in the mask may or may not be counted)."""
    batch, q_len = position_ids.shape if mask is None else (mask.shape[0], position_ids.shape[1])
    positions = position_ids.expand(batch, -1)
    if mask is None:
        return torch.nn.functional.pad(positions.diff(dim=1) != 1, (1, 0))
    real = mask[:, -q_len:].bool()
    index = torch.arange(q_len, device=positions.device).expand(batch, -1)
    last = torch.where(real, index, -1).cummax(dim=1).values
    before = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
    step = positions - positions.gather(1, before.clamp(min=0))
    return real & (before >= 0) & (step != 1) & (step != index - before)


def _read_padding(mask, position_ids) -> bool:
    """Whether the mask hides anything; raises where its rows are packed as well."""
    mask = mask.bool().cpu()
    if bool(mask.all()):
        return False
    if position_ids is not None:
        breaks = _breaks(position_ids.cpu(), mask)
        if bool(breaks.any()):
            row, column = breaks.nonzero()[0].tolist()
            raise ValueError(
                "attention_mask, position_ids: expected positions of real tokens that rise by one in a row with "
                f"padding, got packed documents and padding together (row {row}, token {column}); pack without padding "
                "or pad without packing"
            )
    return True


def _read_documents(position_ids, batch, without_cache, device) -> torch.Tensor | None:
    """cu_seqlens of a row whose positions restart, None for rows of one document each."""
    steps = position_ids.cpu().diff(dim=1)
    if bool((steps == 1).all()):
        return None
    row, column = (steps != 1).nonzero()[0].tolist()
    where = f"row {row}, token {column + 1}"
    if bool((steps > 1).any()):
        raise ValueError(
            "position_ids: expected positions that rise by one, or restart where a packed document begins; got a jump "
            f"forward ({where} is the first irregular one); pass cu_seq_lens_q and cu_seq_lens_k to say what it means"
        )
    if batch != 1:
        raise ValueError(
            f"position_ids: packed documents (positions that restart) need batch 1, got batch {batch} ({where}); put "
            "all documents into one row"
        )
    if not without_cache:
        raise ValueError(
            f"position_ids: packed documents (positions that restart) with filled past_key_values ({where}): the "
            "cached keys have no documents"
        )
    starts = (steps[0] <= 0).nonzero().flatten() + 1
    cu_seqlens = torch.cat([starts.new_zeros(1), starts, starts.new_tensor([steps.shape[1] + 1])])
    return cu_seqlens.to(device, torch.int32)


def _read_cu_seq_lens(cu_seq_lens_q, cu_seq_lens_k, q_len, device) -> torch.Tensor:
    """cu_seq_lens_q as int32 on the device, once both are known to be the same, sound documents."""
    values = cu_seq_lens_q.cpu()
    if cu_seq_lens_k is not cu_seq_lens_q and not torch.equal(values.long(), cu_seq_lens_k.cpu().long()):
        raise ValueError("cu_seq_lens_k: expected cu_seq_lens_q's values (self-attention), got others")
    if int(values[0]) != 0 or int(values[-1]) != q_len or not bool((values.diff() > 0).all()):
        raise ValueError(
            f"cu_seq_lens_q: expected 0 first, strictly increasing, q_len={q_len} last, got {values.tolist()[:12]}"
            f"{'...' if len(values) > 12 else ''}"
        )
    return cu_seq_lens_q.to(device, torch.int32)


def _read_dense_mask(module, mask, query, key, kwargs) -> torch.Tensor | None:
    """The (batch, kv_len) padding in a dense mask, None if there is none; checked to be all that the mask says."""
    batch, _, q_len, _ = query.shape
    kv_len = key.shape[2]
    if mask.shape[0] not in (1, batch) or mask.shape[1:] != (1, q_len, kv_len):
        raise ValueError(
            f"attention_mask: expected a dense mask ({batch} or 1, 1, q_len={q_len}, kv_len={kv_len}), "
            f"got {tuple(mask.shape)}"
        )
    window = kwargs.get("sliding_window")
    packing = {name: kwargs.get(name) for name in ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k")}
    seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0

    def read() -> torch.Tensor | None:
        # A real key is seen by the query that stands on it or, if it is cached, by the first query whose window holds
        # it; a cached key outside every window is nobody's, and may count as padding.
        real = seen.any(dim=1)  # [batch, kv_len]
        distance = torch.arange(kv_len - q_len, kv_len, device=mask.device)[:, None]
        distance = distance - torch.arange(kv_len, device=mask.device)  # [q_len, kv_len]
        pattern = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        binary = (
            seen.new_ones(())
            if mask.dtype == torch.bool
            else ((mask == 0) | (mask <= torch.finfo(mask.dtype).min / 2)).all()
        )
        plain = binary & (seen == (pattern & real[:, None])).all()
        if torch.compiler.is_compiling():
            torch._assert_async(plain, DENSE_MASK)
            return real.expand(batch, -1)
        binary, plain, unpadded = torch.stack([binary, plain, real.all()]).tolist()
        if plain:
            return None if unpadded else real.expand(batch, -1)
        _, cu_seqlens = _visibility(module, query, key, None, **packing)
        if binary and cu_seqlens is not None:
            document = torch.bucketize(torch.arange(kv_len, device=mask.device), cu_seqlens[1:], right=True)
            if torch.equal(seen[0], pattern & (document[:, None] == document)):
                return None
        raise ValueError(f"{DENSE_MASK} (layer window {window}, mask {tuple(mask.shape)})")

    if torch.compiler.is_compiling():
        return read()
    others = tuple(x if isinstance(x, torch.Tensor) else None for x in packing.values())  # checked when they are used
    return _once_a_forward(module, mask, others, (batch, kv_len, window), read)
