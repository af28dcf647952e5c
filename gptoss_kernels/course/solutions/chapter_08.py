"""Chapter 08, attention and its mask inside Transformers."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import torch

from ...attention.api import flash_attention
from ...attention.reference import attention_reference
from ..check import Mistake

# -------------------------------------------------------------------------------------------- attention_adapter


def attention_adapter(
    module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention signature on flash_attention.

    query (batch, q_heads, q_len, head_dim), key and value (batch, kv_heads, kv_len, head_dim), attention_mask
    (batch, kv_len) bool or None -> (batch, q_len, q_heads, head_dim), None.
    """
    if dropout:
        raise ValueError(f"dropout: expected 0, got {dropout}")
    out = flash_attention(
        query,
        key,
        value,
        s_aux,
        scale=scaling,
        sliding_window=sliding_window,
        cu_seqlens=cu_seqlens,
        key_padding_mask=attention_mask,
    )
    return out.transpose(1, 2), None


def check_attention_adapter(function: Callable) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    q, k, v, sinks = draw(2, 2, 7, 16), draw(2, 1, 7, 16), draw(2, 1, 7, 16), 1 + draw(2).abs()
    padding = torch.tensor([[False] * 3 + [True] * 4, [True] * 7])
    module = SimpleNamespace(sinks=sinks, sliding_window=3, scaling=0.6, is_causal=True, training=False, layer_idx=0)

    def call(mask, **changed):
        given = {"scaling": 0.6, "dropout": 0.0, "sliding_window": 3, "s_aux": sinks, **changed}
        tensors = (x.clone().requires_grad_() for x in (q, k, v))
        extra = {"position_ids": torch.arange(7)[None], "use_cache": False}
        if "cu_seqlens" in changed:
            tensors = (x.clone().requires_grad_() for x in (q[:1], k[:1], v[:1]))
        return _out(_call(function, module, *tensors, mask, **given, **extra))

    def exact(mask=None, z=sinks, scale=0.6, window=3, rows=2, **keywords):
        inputs = (q[:rows], k[:rows], v[:rows])
        out, _ = attention_reference(*inputs, z, scale=scale, sliding_window=window, key_padding_mask=mask, **keywords)
        return out.transpose(1, 2)

    got = call(None)
    right = exact()
    if got.shape == (2, 2, 7, 16):
        raise Mistake(
            "the heads are still in front of the tokens: Transformers reshapes (batch, q_len, heads, head_dim) to "
            "(batch, q_len, heads * head_dim), so transpose dimensions 1 and 2 of what flash_attention returns"
        )
    if got.shape != right.shape:
        raise Mistake(f"expected an output of shape {tuple(right.shape)}, got {tuple(got.shape)}")
    known = {
        "a reshape scrambles heads and tokens: transpose dimensions 1 and 2": right.transpose(1, 2).reshape(
            2, 7, 2, 16
        ),
        "the sinks are lost: they arrive as s_aux": exact(z=None),
        "the sinks are scaled: they are logits as they stand": exact(z=sinks * 0.6),
        "the sinks have the wrong sign": exact(z=-sinks),
        "the window is lost: it arrives as sliding_window": exact(window=None),
        "the window is one key too wide: sliding_window counts the query's own key already": exact(window=4),
        "the window is one key too narrow: sliding_window counts the query's own key already": exact(window=2),
        "scaling is lost: hand it to flash_attention as scale": exact(scale=None),
        "scaling is applied twice: flash_attention does it, leave the query alone": exact(scale=0.36),
        "sinks and window are lost: they arrive as s_aux and sliding_window": exact(z=None, window=None),
        "sinks, window and scaling are lost: they arrive as s_aux, sliding_window, scaling": exact(
            z=None, window=None, scale=None
        ),
        "sinks and scaling are lost: they arrive as s_aux and scaling": exact(z=None, scale=None),
        "window and scaling are lost: they arrive as sliding_window and scaling": exact(window=None, scale=None),
    }
    _compare(got, right, known, "without padding")
    if not got.requires_grad:
        raise Mistake("the result is cut off from autograd: no detach, no torch.no_grad, no .data")

    got, right = call(padding), exact(padding)
    if got.shape != right.shape:
        raise Mistake(f"with padding: expected an output of shape {tuple(right.shape)}, got {tuple(got.shape)}")
    real = padding[:, :, None, None]  # rows of padding may hold anything
    known = {
        "padding is seen: hand attention_mask to flash_attention as key_padding_mask": exact(),
        "the mask is inverted: True stands for a real token in both libraries": exact(~padding),
    }
    _compare(got * real, right * real, {text: wrong * real for text, wrong in known.items()}, "with left padding")

    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    got, right = call(None, cu_seqlens=cu_seqlens), exact(rows=1, cu_seqlens=cu_seqlens)
    _compare(
        got, right, {"cu_seqlens is lost: hand it on, the packed documents see each other": exact(rows=1)}, "packed"
    )

    try:
        function(module, q, k, v, None, scaling=0.6, dropout=0.1, sliding_window=3, s_aux=sinks)
    except Exception:
        return
    raise Mistake("dropout of 0.1 was ignored in silence: there is none in the kernels, so raise ValueError")


def _call(function, *args, **keywords):
    try:
        return function(*args, **keywords)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        try:
            function(*args, *keywords.values())
        except NotImplementedError:  # a stub is a stub, whatever its signature
            raise
        except Exception:
            pass
        raise Mistake(
            f"Transformers passes more than you use ({', '.join(keywords)}): end the signature with **kwargs; {error}"
        ) from error


def _out(result) -> torch.Tensor:
    if not isinstance(result, tuple) or len(result) != 2:
        got = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
        raise Mistake(f"Transformers unpacks two values, output and weights: return (out, None), got {got}")
    if not isinstance(result[0], torch.Tensor):
        raise Mistake(f"expected a tensor and None, got {type(result[0]).__name__} first")
    return result[0]


def _compare(got, right, known, case) -> None:
    if got.shape != right.shape:
        raise Mistake(f"{case}: expected an output of shape {tuple(right.shape)}, got {tuple(got.shape)}")
    got = got.detach().to(right.dtype).cpu()
    if torch.allclose(got, right, atol=1e-4):
        return
    for message, wrong in known.items():
        if torch.allclose(got, wrong, atol=1e-4):
            raise Mistake(message)
    index = tuple(((got - right).abs() > 1e-4).logical_or(got.isnan()).nonzero()[0].tolist())
    raise Mistake(
        f"{case}: expected {right[index]:.4f} at [batch, token, head, dim] {list(index)}, got {got[index]:.4f}"
    )


# ------------------------------------------------------------------------------------------------- layer_padding


def layer_padding(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor | None:
    """attention_mask (batch, tokens seen so far) bool or None -> its columns of a layer's keys (batch, kv_length)."""
    if attention_mask is None:
        return None
    return attention_mask[:, kv_offset : kv_offset + kv_length]


def check_layer_padding(function: Callable) -> None:
    def call(mask, q_length, kv_length, kv_offset):
        tokens = 10 if mask is None else mask.shape[1]
        extra = {"mask_function": None, "allow_is_causal_skip": True, "dtype": torch.float32, "config": None}
        sizes = {"batch_size": 2, "q_length": q_length, "kv_length": kv_length}
        offsets = {"q_offset": tokens - q_length, "kv_offset": kv_offset}
        extra |= {"use_vmap": False, "device": torch.device("cpu"), "local_size": 4}
        return _call(function, **sizes, **offsets, attention_mask=mask, **extra)

    # Row 0 has 3 tokens of padding on the left, row 1 has 2 on the right; each window below holds some of either.
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    for mask_now, q_length, kv_length, kv_offset, case in (
        (mask, 10, 10, 0, "prefill"),
        (mask[:, :6], 1, 4, 2, "decoding in a sliding layer, whose cache holds tokens 2 to 5"),
        (mask, 1, 4, 6, "decoding in a sliding layer, whose cache holds tokens 6 to 9"),
        (mask, 3, 6, 4, "three queries in a sliding layer, whose keys are tokens 4 to 9"),
    ):
        right = mask_now[:, kv_offset : kv_offset + kv_length]
        got = call(mask_now.clone(), q_length, kv_length, kv_offset)
        if not isinstance(got, torch.Tensor):
            raise Mistake(f"{case}: there is padding, expected a tensor of shape {tuple(right.shape)}, got {got!r}")
        if got.dim() == 4:
            raise Mistake(
                f"that is a dense mask, {tuple(got.shape)}: the kernel knows causality and window by itself, "
                "hand the 2-D padding through"
            )
        if got.shape == mask_now.shape != right.shape:
            raise Mistake(
                f"the whole mask has {got.shape[1]} columns, this layer has {kv_length} keys: a sliding layer's cache "
                "keeps the last ones only; kv_offset says which token is the first of them"
            )
        if q_length != kv_length and got.shape == (2, q_length):
            raise Mistake("those are the columns of the queries: what is hidden is keys, kv_length of them")
        if got.shape != right.shape:
            raise Mistake(f"{case}: expected shape (batch, kv_length) = {tuple(right.shape)}, got {tuple(got.shape)}")
        if got.dtype != torch.bool:
            raise Mistake(f"flash_attention takes a bool mask, True for a real token; got {got.dtype}")
        if torch.equal(got, right):
            continue
        if torch.equal(got, ~right):
            raise Mistake("the mask is inverted: True stands for a real token, as it came")
        if kv_offset and torch.equal(got, mask_now[:, :kv_length]):
            raise Mistake(
                f"{case}: those are the first {kv_length} tokens: this layer's keys begin at "
                f"token kv_offset = {kv_offset}"
            )
        raise Mistake(f"{case}: expected {right[0].tolist()} for row 0, got {got[0].tolist()}")
    got = call(None, 10, 10, 0)
    if got is None or isinstance(got, torch.Tensor) and got.shape == (2, 10) and got.dtype == torch.bool and got.all():
        return
    raise Mistake(f"attention_mask=None means that nothing is padding: expected None, got {got!r}")


# ------------------------------------------------------------------------------------------------------ influence


def influence(run: Callable, embeddings: torch.Tensor, first: int) -> torch.Tensor:
    """run: (1, tokens, hidden) -> (1, tokens, vocabulary). How strongly each token before `first` reaches the outputs
    from `first` on, (first,): 0 exactly where no path leads."""
    leaf = embeddings.detach().requires_grad_()
    out = run(leaf)[:, first:]
    (gradient,) = torch.autograd.grad(out.square().sum(), leaf)
    return gradient[0, :first].norm(dim=-1)


def check_influence(function: Callable) -> None:
    tokens, first, hidden = 5, 3, 4
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(1, tokens, hidden, generator=generator, dtype=torch.float64)
    weight = torch.randn(hidden, 6, generator=generator, dtype=torch.float64)
    apart = torch.ones(tokens, tokens, dtype=torch.float64).tril()
    apart[first:, :first] = 0
    leaking = apart.clone()
    leaking[4, 1] = 1e-9  # token 1 reaches token 4, hardly

    def call(mixing, outputs=lambda x: x):
        got = function(lambda x: outputs(mixing @ x @ weight), embeddings.clone(), first)
        if not isinstance(got, torch.Tensor):
            raise Mistake(f"expected a tensor of shape ({first},), got {type(got).__name__}")
        if got.shape == (first, hidden):
            raise Mistake(f"one number a token: reduce over hidden too, (first, hidden) = {(first, hidden)} is left")
        if got.shape in ((tokens,), (1, tokens)):
            raise Mistake("only the tokens before `first` are asked for: the others reach their own outputs anyway")
        if got.shape != (first,):
            raise Mistake(f"expected shape (first,) = ({first},), got {tuple(got.shape)}")
        return got.detach()

    got = call(apart)
    if got.any():
        raise Mistake(
            "that counts document 1's influence on itself: keep the outputs from `first` on, [:, first:]; expected "
            f"zeros where no path leads, got {got.tolist()}"
        )
    got = call(leaking)
    if (got < 0).any():
        raise Mistake("numbers of either sign can cancel: take a norm, or absolute values, over hidden")
    if got[0] != 0 or got[2] != 0:
        raise Mistake(f"only token 1 reaches document 2 here: expected [0, > 0, 0], got {got.tolist()}")
    if not got[1] > 0:
        raise Mistake(
            "a weak path is a leak too: token 1 reaches token 4 with a weight of 1e-9; no threshold, no rounding"
        )
    opposed = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)[:, None]  # gradients along it sum to 0
    one = apart.clone()
    one[4, 1] = 1.0
    if not function(lambda x: one @ x @ opposed, embeddings.clone(), first)[1] > 1e-9:
        raise Mistake(
            "the components of one gradient can cancel in a sum: take a norm, or absolute values, over hidden"
        )
    if not call(one, outputs=lambda x: x.softmax(-1))[1] > 1e-9:
        raise Mistake(
            "the outputs' plain sum can be constant (probabilities sum to 1) and its gradient then 0 despite a leak: "
            "sum their squares"
        )


# ------------------------------------------------------------------------------------- cu_seqlens_from_positions


def cu_seqlens_from_positions(position_ids: torch.Tensor) -> torch.Tensor:
    """position_ids (1, tokens) of one packed row -> (documents + 1,) int32: 0, where each document ends."""
    tokens = position_ids.shape[1]
    begins = (position_ids[0].diff() != 1).nonzero().flatten() + 1  # tokens that do not follow on their predecessor
    ends = torch.cat([begins.new_zeros(1), begins, begins.new_tensor([tokens])])
    return ends.to(torch.int32)


def check_cu_seqlens_from_positions(function: Callable) -> None:
    cases = (
        ([0, 1, 2, 0, 1], [0, 3, 5], {
            "lengths, not ends: cumulate them": ([3, 2], [0, 3, 2]),
            "the row's end is missing: cu_seqlens has documents + 1 entries": ([0, 3],),
            "the 0 in front is missing: cu_seqlens has documents + 1 entries": ([3, 5],),
            "one off: entry i of diff belongs to token i + 1, where the document begins": ([0, 2, 5], [0, 2, 4]),
            "the last entry is the number of tokens, not the index of the last one": ([0, 3, 4],),
            "both ends are missing: put 0 in front and the number of tokens last": ([3], [2]),
        }),
        ([0, 1, 2, 0, 0, 1], [0, 3, 4, 6], {
            "a document of one token is swallowed: from it to the next the step is 0, not negative": ([0, 3, 6],),
        }),
        ([3, 4, 5, 0, 1], [0, 3, 5], {
            "the first document begins at token 0, whatever its position is": ([3, 5], [3, 3, 5]),
        }),
        ([5, 6, 7, 5, 6], [0, 3, 5], {
            "a document need not begin at position 0: look for a step that is not +1, not for zeros": (
                [0, 5], [5], [0], [0, 0, 5],
            ),
        }),
        ([0, 1, 2, 3], [0, 4], {}),
        ([7], [0, 1], {}),
        ([0, 0, 0], [0, 1, 2, 3], {}),
    )  # fmt: skip
    dtypes = set()
    for positions, right, known in cases:
        got = function(torch.tensor([positions]))
        if not isinstance(got, torch.Tensor):
            raise Mistake(f"expected a tensor of shape (documents + 1,), got {type(got).__name__}")
        if got.dim() != 1:
            raise Mistake(f"expected one dimension, (documents + 1,), got shape {tuple(got.shape)}")
        dtypes.add(got.dtype)
        values = got.tolist()
        if values == right:
            continue
        for message, wrong in known.items():
            if values in wrong:
                raise Mistake(message)
        if any(b <= a for a, b in itertools.pairwise(values)):
            raise Mistake(f"cu_seqlens must rise strictly: expected {right} for positions {positions}, got {values}")
        raise Mistake(f"expected {right} for positions {positions}, got {values}")
    if dtypes != {torch.int32}:
        raise Mistake(f"flash_attention takes int32, got {', '.join(map(str, sorted(dtypes, key=str)))}")
