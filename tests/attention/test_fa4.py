"""backend="fa4": what it hands to FlashAttention-4 and what it refuses, on the CPU; its numbers, on a GPU."""

import importlib.metadata
import importlib.util
import sys
import types

import pytest
import torch

from gptoss_kernels import flash_attention
from gptoss_kernels.attention import fa4
from gptoss_kernels.attention.reference import attention_reference
from gptoss_kernels.testing import AttentionCase, exact_attention, relative_error

NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")
LIMITS = {"out": 4e-3, "lse": 1e-5, "dq": 4e-3, "dk": 4e-3, "dv": 4e-3, "dsinks": 6e-3}  # as for the Triton kernels
WINDOW = 128


# ------------------------------------------------------------------------------------------- flash_attn.cute in PyTorch


class FakeFA4:
    """flash_attn.cute's two functions with the parameters and tensor layouts of 4.0.0b36; keeps its last arguments."""

    def __init__(self):
        self.calls = []

    def flash_attn_func(
        self, q, k, v, *, softmax_scale, causal, window_size, learnable_sink, deterministic, return_lse
    ):
        handed = dict(q=q, k=k, v=v, learnable_sink=learnable_sink, deterministic=deterministic, return_lse=return_lse)
        self.calls.append(handed)
        assert causal and q.dtype in (torch.float16, torch.bfloat16)
        left, right = window_size
        assert right == (None if left is None else 0)
        out, lse = attention_reference(
            *(x.transpose(1, 2) for x in (q, k, v)),  # (batch, length, heads, head_dim) here
            learnable_sink,
            scale=softmax_scale,
            sliding_window=None if left is None else left + 1,
        )
        return out.transpose(1, 2), lse if return_lse else None

    def flash_attn_varlen_func(self, q, k, v, *, cu_seqlens_q, cu_seqlens_k, **options):
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.is_contiguous()
        lengths = cu_seqlens_q.diff().tolist()
        documents = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        parts = [self.flash_attn_func(*(x[None] for x in document), **options) for document in documents]
        self.calls[:] = [self.calls[-1] | dict(q=q, k=k, v=v, documents=len(lengths))]
        out, lse = zip(*parts, strict=True)
        return torch.cat(out, 1)[0], torch.cat(lse, 2)[0] if options["return_lse"] else None


@pytest.fixture
def version(monkeypatch):
    """Sets the installed version of flash-attn-4; None: not installed."""
    find = importlib.metadata.version

    def set_version(value):
        def found(name):
            if name != "flash-attn-4":
                return find(name)
            if value is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return value

        monkeypatch.setattr(importlib.metadata, "version", found)
        fa4.load_fa4.cache_clear()

    yield set_version
    monkeypatch.undo()
    fa4.load_fa4.cache_clear()


@pytest.fixture
def fake(version, monkeypatch):
    """FlashAttention-4 on the CPU, which passes for a Hopper GPU."""
    fake = FakeFA4()
    module = types.ModuleType("flash_attn.cute")
    module.flash_attn_func, module.flash_attn_varlen_func = fake.flash_attn_func, fake.flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    monkeypatch.setattr(fa4, "_capability", lambda q: (9, 0))
    version(fa4.MINIMUM)
    return fake


def small(**changes) -> AttentionCase:
    return AttentionCase(**(dict(q_len=70, head_dim=32, dtype=torch.float16) | changes))


def gradient_like(x: torch.Tensor, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.randn(x.shape, device=x.device, generator=generator).to(x.dtype)


def forward_backward(inputs, keywords, grad_out, grad_lse=None):
    out, lse = flash_attention(*inputs, **keywords, return_lse=True, backend="fa4")
    outputs, grads = ((out,), (grad_out,)) if grad_lse is None else ((out, lse), (grad_out, grad_lse))
    return [out.detach(), lse.detach(), *torch.autograd.grad(outputs, inputs, grads)]


def check(case: AttentionCase, device: str, with_grad_lse: bool = False, **more) -> None:
    inputs, keywords = case.inputs(device)
    keywords |= more
    grad_out = gradient_like(inputs[0])
    grad_lse = gradient_like(inputs[0][..., 0].float(), 2) if with_grad_lse else None
    actual = forward_backward(inputs, keywords, grad_out, grad_lse)
    names = NAMES[: len(actual)]
    assert [x.dtype for x in actual[2:]] == [x.dtype for x in inputs]
    assert actual[0].transpose(1, 2).is_contiguous() and actual[1].dtype == torch.float32
    exact = exact_attention(inputs, grad_out, grad_lse, **keywords)
    errors = {name: relative_error(a, x) for name, a, x in zip(names, actual, exact, strict=True)}
    print(f"\n{case}: " + "  ".join(f"{name} {error:.2e}" for name, error in errors.items()), end="")
    over = {name: error for name, error in errors.items() if not error <= LIMITS[name]}
    assert not over, f"relative errors over their limits: {over}"


# ------------------------------------------------------------------------------------------------------ what is refused


def call(**changes):
    shapes = {"q": (1, 4, 6, 32), "k": (1, 2, 6, 32), "v": (1, 2, 6, 32)}
    tensors = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
    return flash_attention(**(tensors | changes), backend="fa4")


def test_not_installed(version):
    version(None)
    with pytest.raises(RuntimeError, match='backend="fa4": FlashAttention-4 .* is not installed; .*pip install'):
        call()


@pytest.mark.parametrize("older", ["4.0.0b9", "4.0.0b35"])
def test_too_old(fake, version, older):
    version(older)
    with pytest.raises(RuntimeError, match=f"expected flash-attn-4 4.0.0b36 or newer, got {older}"):
        call()
    for enough in ("4.0.0b36", "4.0.0", "4.1.0b1"):
        version(enough)
        call()


def test_that_cannot_be_loaded(fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)  # importing it raises
    with pytest.raises(RuntimeError, match='backend="fa4": flash-attn-4 4.0.0b36 cannot be loaded: .*flash_attn.cute'):
        call()


@pytest.mark.parametrize("found", [(8, 0), (8, 9), (12, 0), None])
def test_other_devices(fake, monkeypatch, found):
    monkeypatch.setattr(fa4, "_capability", lambda q: found)
    wanted = "expected q on a CUDA device, got q on cpu" if found is None else f"Hopper .* got {found[0]}.{found[1]}:"
    with pytest.raises(RuntimeError, match=wanted):
        call()
    for major in (9, 10, 11):
        monkeypatch.setattr(fa4, "_capability", lambda q, major=major: (major, 0))
        call()


def test_a_cpu_is_no_gpu():
    assert fa4._capability(torch.zeros(1, 1, 2, 32)) is None


def test_other_dtypes(fake):
    single = {name: torch.zeros(1, 2, 6, 32) for name in "qkv"}
    with pytest.raises(
        TypeError, match='q: backend="fa4" expected one of torch.float16, torch.bfloat16, got .*float32'
    ):
        call(**single)
    with pytest.raises(TypeError, match="q: expected one of .* got torch.float64"):
        call(**{name: x.double() for name, x in single.items()})


def test_other_head_dims(fake):
    with pytest.raises(ValueError, match=r"q: backend=\"fa4\" expected head_dim in \(32, 64, 96, 128\), got 16"):
        call(**{name: torch.zeros(1, 2, 6, 16, dtype=torch.float16) for name in "qkv"})


def test_padding(fake):
    with pytest.raises(ValueError, match='key_padding_mask: backend="fa4" expected None.*cu_seqlens'):
        call(key_padding_mask=torch.ones(1, 6, dtype=torch.bool))


def test_is_never_chosen_by_auto(fake):
    inputs, keywords = small(q_len=9).inputs()
    flash_attention(*inputs, **keywords)
    assert not fake.calls
    flash_attention(*inputs, **keywords, backend="fa4")
    assert len(fake.calls) == 1


# ---------------------------------------------------------------------------------------------------- what is handed on


CASES = [
    small(),
    small(batch=2, sinks=False),
    small(window=9),
    small(window=1),
    small(window=70),
    small(window=10**12),
    small(documents=(1, 30, 39)),
    small(documents=(1, 30, 39), window=9, kv_heads=1),
    small(documents=(70,), sinks=False),
    small(q_len=1, kv_len=50),
    small(q_len=20, kv_len=50, batch=2, window=9),
    small(dtype=torch.bfloat16, head_dim=96),
]


@pytest.mark.parametrize("with_grad_lse", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_arguments_mean_the_same(fake, case, with_grad_lse):
    check(case, "cpu", with_grad_lse)
    handed = fake.calls[-1]
    assert ("documents" in handed) == (case.documents is not None)


def test_scale(fake):
    check(small(), "cpu", scale=0.3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sinks_of_another_dtype(fake, dtype):
    inputs, keywords = small().inputs()
    inputs[3] = inputs[3].detach().to(dtype).requires_grad_()
    grad_out = gradient_like(inputs[0])
    actual = forward_backward(inputs, keywords, grad_out)
    assert actual[5].dtype == dtype
    assert fake.calls[-1]["learnable_sink"].dtype == (torch.float32 if dtype == torch.float64 else dtype)
    assert relative_error(actual[5], exact_attention(inputs, grad_out)[5]) <= LIMITS["dsinks"]


@pytest.mark.parametrize("documents", [None, (30, 40)])
def test_nothing_is_copied(fake, documents):
    inputs, keywords = small(documents=documents).inputs()
    inputs[:2] = (x.contiguous() for x in inputs[:2])  # v stays as Transformers stores it
    assert inputs[0].stride() != inputs[0].transpose(1, 2).contiguous().transpose(1, 2).stride()
    flash_attention(*inputs, **keywords, backend="fa4")
    for name, x in zip("qkv", inputs, strict=False):
        handed = fake.calls[-1][name]
        assert handed.data_ptr() == x.data_ptr()
        assert handed.shape[-3:] == x[0].transpose(0, 1).shape and handed.stride()[-3:] == x[0].transpose(0, 1).stride()


def test_without_lse(fake):
    inputs, keywords = small(documents=(30, 40)).inputs()
    out = flash_attention(*inputs, **keywords, backend="fa4")
    assert relative_error(out, attention_reference(*inputs, **keywords)[0]) <= LIMITS["out"]
    assert not fake.calls[-1]["return_lse"]


def test_determinism_follows_torch(fake):
    call()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        call()
    finally:
        torch.use_deterministic_algorithms(before)
    assert [handed["deterministic"] for handed in fake.calls] == [False, True]


def test_torch_compile_leaves_it_out(fake):
    inputs, keywords = small(q_len=9).inputs()

    def attend(q, k, v, sinks):
        return flash_attention(2 * q, k, v, sinks, backend="fa4") + 1

    compiled = torch.compile(attend, backend="eager")
    assert torch.equal(compiled(*inputs), attend(*inputs)) and len(fake.calls) == 2
    torch._dynamo.reset()  # what was compiled for the same code would serve
    with pytest.raises(torch._dynamo.exc.Unsupported, match="FlashAttention-4 cannot be traced"):
        torch.compile(attend, backend="eager", fullgraph=True)(*inputs)


# ------------------------------------------------------------------------------------------------------------- on a GPU


def installed() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False


def on_a_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not installed(), reason="flash-attn-4 is not installed")(test))


def gpt_oss(tokens: int, **changes) -> AttentionCase:
    shapes = dict(q_heads=64, kv_heads=8, head_dim=64, dtype=torch.bfloat16)
    return AttentionCase(q_len=tokens, **(shapes | changes))


def uneven(tokens: int) -> tuple[int, ...]:
    """Documents of one token, of a tile's size more or less one, and a long one."""
    short = (1, 127, 129, 1, 64, 300)
    return (*short, tokens - sum(short))


@on_a_gpu
@pytest.mark.parametrize("mask", ["full", "window", "packed", "packed window"])
@pytest.mark.parametrize("tokens", [2048, 2011, 16384])
def test_relative_error_in_bfloat16(tokens, mask):
    documents = uneven(tokens) if "packed" in mask else None
    check(gpt_oss(tokens, window=WINDOW if "window" in mask else None, documents=documents), "cuda")


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", fa4.HEAD_DIMS)
def test_every_head_dim_and_dtype(head_dim, dtype):
    check(gpt_oss(515, q_heads=8, kv_heads=2, head_dim=head_dim, dtype=dtype, window=200), "cuda")
    check(gpt_oss(515, q_heads=8, kv_heads=2, head_dim=head_dim, dtype=dtype), "cuda")


@on_a_gpu
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (10, 2), (8, 1)], ids=str)
def test_groups_of_query_heads(heads):
    for changes in ({}, {"window": 100}, {"documents": (100, 200, 215)}):
        check(gpt_oss(515, q_heads=heads[0], kv_heads=heads[1], batch=1 if changes else 3, **changes), "cuda")


@on_a_gpu
@pytest.mark.parametrize("window", [None, WINDOW])
def test_decoding_and_chunked_prefill(window):
    for q_len in (1, 100):
        check(gpt_oss(q_len, kv_len=3001, window=window), "cuda")


def gradients_of_one_key(q, k, v, sinks, dout, out) -> tuple[torch.Tensor, torch.Tensor]:
    """dq and dk in fp64 where a query sees its own key alone, with delta from the given out."""
    length, group = q.shape[2], q.shape[1] // k.shape[1]
    q, k, v, sinks, dout, out = (x.detach().double() for x in (q, k, v, sinks, dout, out))
    seen_k, seen_v = (x[:, :, -length:].repeat_interleave(group, 1) for x in (k, v))
    scale = q.shape[3] ** -0.5
    p = torch.sigmoid((q * seen_k).sum(-1) * scale - sinks[:, None])
    ds = (p * ((dout * seen_v).sum(-1) - (dout * out).sum(-1)) * scale)[..., None]
    dk = torch.zeros_like(k)
    dk[:, :, -length:] = (ds * q).unflatten(1, (-1, group)).sum(2)
    return ds * seen_k, dk


@pytest.mark.parametrize("q_len", [1, 100])
def test_gradients_of_one_key_are_those_of_the_reference(q_len):
    inputs, keywords = small(q_len=q_len, kv_len=q_len + 30, window=1).inputs("cpu")
    grad_out = gradient_like(inputs[0])
    out, _, *gradients = exact_attention(inputs, grad_out, **keywords)
    for a, x in zip(gradients_of_one_key(*inputs, grad_out, out), gradients, strict=False):
        assert relative_error(a, x) < 1e-14


@on_a_gpu
@pytest.mark.parametrize("q_len", [1, 100])
def test_window_of_one_key(q_len):
    # dS = P (dP - delta) is P (1 - P) dP here: what rounding O to 16 bits changes in delta counts in full, whoever
    # computes dS from O. So dq and dk may be off by that much more.
    inputs, keywords = gpt_oss(q_len, kv_len=3001, window=1).inputs("cuda")
    grad_out = gradient_like(inputs[0])
    actual, exact = forward_backward(inputs, keywords, grad_out), exact_attention(inputs, grad_out, **keywords)
    of_rounded = gradients_of_one_key(*inputs, grad_out, exact[0].to(inputs[0].dtype))
    more = {name: relative_error(a, x) for name, a, x in zip(("dq", "dk"), of_rounded, exact[2:4], strict=True)}
    errors = {name: relative_error(a, x) for name, a, x in zip(NAMES, actual, exact, strict=True)}
    print(f"\n{q_len}: {errors}, of which by rounding O: {more}", end="")
    over = {name: error for name, error in errors.items() if not error <= LIMITS[name] + more.get(name, 0.0)}
    assert not over, f"relative errors over their limits: {over}"


@on_a_gpu
@pytest.mark.parametrize("sinks", [True, False])
@pytest.mark.parametrize("changes", [{}, {"window": WINDOW}, {"documents": (1, 500, 510)}], ids=str)
def test_gradient_through_lse(sinks, changes):
    check(gpt_oss(1011, sinks=sinks, **changes), "cuda", with_grad_lse=True)


@on_a_gpu
def test_more_documents_than_their_scheduler_searches_one_by_one():
    check(gpt_oss(3000, documents=(10,) * 300), "cuda")


@on_a_gpu
def test_views_of_one_projection():
    fused = torch.randn(1, 700, 80 * 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    heads = fused.unflatten(-1, (80, 64)).transpose(1, 2)
    views = heads[:, :64], heads[:, 64:72], heads[:, 72:]
    sinks = torch.randn(64, device="cuda", requires_grad=True)
    grad_out = gradient_like(views[0])
    grad, dsinks = torch.autograd.grad(flash_attention(*views, sinks, backend="fa4"), (fused, sinks), grad_out)
    _, _, dq, dk, dv, want = exact_attention([*views, sinks], grad_out)
    assert relative_error(grad, torch.cat([dq, dk, dv], 1).transpose(1, 2).flatten(2)) <= LIMITS["dq"]
    assert relative_error(dsinks, want) <= LIMITS["dsinks"]


@on_a_gpu
@pytest.mark.parametrize("documents", [None, uneven(4096)], ids=["one document", "packed"])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_deterministic_where_torch_is_asked_to_be(window, documents):
    case = gpt_oss(4096, window=window, documents=documents)
    inputs, keywords = case.inputs("cuda")
    grad_out = gradient_like(inputs[0])
    torch.use_deterministic_algorithms(True)
    try:
        check(case, "cuda")
        first = forward_backward(inputs, keywords, grad_out)
        for _ in range(5):
            for name, a, b in zip(NAMES, first, forward_backward(inputs, keywords, grad_out), strict=True):
                assert torch.equal(a, b), name
    finally:
        torch.use_deterministic_algorithms(False)


@on_a_gpu
@pytest.mark.parametrize("window", [None, WINDOW])
def test_no_synchronisation(window):
    inputs, keywords = gpt_oss(512, window=window, documents=(1, 300, 211)).inputs("cuda")
    grad_out = gradient_like(inputs[0])
    forward_backward(inputs, keywords, grad_out)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_backward(inputs, keywords, grad_out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
