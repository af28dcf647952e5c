"""Wrong attempts at chapter 08's exercises get the message that names them; other ways to be right are accepted."""

import pytest
import torch

from gptoss_kernels import flash_attention
from gptoss_kernels.course import check


def rejected(function, name, message):
    function.__name__ = name
    with pytest.raises(check.Mistake, match=message):
        check.attempt(function, chapter=8, strict=True)


def accepted(function, name):
    function.__name__ = name
    assert check.attempt(function, chapter=8, strict=True) is function


# -------------------------------------------------------------------------------------------- attention_adapter


def adapter(wrong):
    """A right adapter on the PyTorch reference, but for what `wrong` changes in its arguments and its output."""

    def attempt(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        given = {
            "sinks": kwargs["s_aux"],
            "scale": scaling,
            "sliding_window": kwargs["sliding_window"],
            "cu_seqlens": kwargs.get("cu_seqlens"),
            "key_padding_mask": attention_mask,
            "dropout": dropout,
            "finish": lambda out: (out.transpose(1, 2), None),
        }
        given.update(wrong(given))
        if given.pop("dropout"):
            raise ValueError("dropout")
        finish = given.pop("finish")
        return finish(flash_attention(query, key, value, backend="reference", **given))

    return attempt


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda g: {"finish": lambda out: (out, None)}, "heads are still in front"),
        (lambda g: {"finish": lambda out: (out.transpose(1, 2)[:, :5], None)}, r"expected an output of shape \(2, 7"),
        (lambda g: {"finish": lambda out: (out.reshape(2, 7, 2, 16), None)}, "reshape scrambles"),
        (lambda g: {"finish": lambda out: out.transpose(1, 2)}, r"return \(out, None\), got Tensor"),
        (lambda g: {"finish": lambda out: (out.transpose(1, 2), None, None)}, "got a tuple of 3"),
        (lambda g: {"finish": lambda out: (None, out)}, "expected a tensor and None, got NoneType"),
        (lambda g: {"finish": lambda out: (out.transpose(1, 2).detach(), None)}, "cut off from autograd"),
        (lambda g: {"finish": lambda out: (torch.zeros_like(out.transpose(1, 2)), None)}, "without padding: expected"),
        (lambda g: {"finish": lambda out: (out.transpose(1, 2) * float("nan"), None)}, "without padding: expected"),
        (lambda g: {"sinks": None}, "sinks are lost"),
        (lambda g: {"sinks": g["sinks"] * g["scale"]}, "sinks are scaled"),
        (lambda g: {"sinks": -g["sinks"]}, "wrong sign"),
        (lambda g: {"sliding_window": None}, "window is lost"),
        (lambda g: {"sliding_window": g["sliding_window"] + 1}, "one key too wide"),
        (lambda g: {"sliding_window": g["sliding_window"] - 1}, "one key too narrow"),
        (lambda g: {"scale": None}, "scaling is lost"),
        (lambda g: {"scale": g["scale"] ** 2}, "scaling is applied twice"),
        (lambda g: {"sinks": None, "sliding_window": None}, "sinks and window are lost"),
        (lambda g: {"sinks": None, "scale": None}, "sinks and scaling are lost"),
        (lambda g: {"sliding_window": None, "scale": None}, "window and scaling are lost"),
        (lambda g: {"sinks": None, "sliding_window": None, "scale": None}, "sinks, window and scaling are lost"),
        (lambda g: {"key_padding_mask": None}, "padding is seen"),
        (
            lambda g: {"key_padding_mask": None if g["key_padding_mask"] is None else ~g["key_padding_mask"]},
            "mask is inverted",
        ),
        (lambda g: {"cu_seqlens": None}, "cu_seqlens is lost"),
        (lambda g: {"dropout": 0.0}, "dropout of 0.1 was ignored"),
    ],
)
def test_attention_adapter_names_the_mistake(wrong, message):
    rejected(adapter(wrong), "attention_adapter", message)


def test_attention_adapter_must_take_what_it_does_not_need():
    def attempt(module, query, key, value, attention_mask, scaling, dropout, sliding_window, s_aux):
        return query.transpose(1, 2), None

    rejected(attempt, "attention_adapter", r"end the signature with \*\*kwargs")


def test_attention_adapter_other_ways_to_be_right():
    accepted(adapter(lambda g: {}), "attention_adapter")

    def from_the_module(module, query, key, value, attention_mask, *args, **kwargs):
        if kwargs["dropout"] > 0:
            raise NotImplementedError("no dropout")
        documents = {name: kwargs[name] for name in ("cu_seqlens",) if name in kwargs}
        query = query * (kwargs["scaling"] * query.shape[-1] ** 0.5)
        out = flash_attention(
            query, key, value, module.sinks, sliding_window=module.sliding_window, key_padding_mask=attention_mask,
            backend="reference", **documents,
        )  # fmt: skip
        return out.permute(0, 2, 1, 3).contiguous().double(), torch.empty(0)

    accepted(from_the_module, "attention_adapter")


# ------------------------------------------------------------------------------------------------- layer_padding


def padding(cut):
    def attempt(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, attention_mask=None, **kwargs):
        return None if attention_mask is None else cut(attention_mask, q_length, kv_length, q_offset, kv_offset)

    return attempt


def _dense(m, q, kv, qo, ko):
    return m[:, None, None, ko : ko + kv].expand(-1, 1, q, -1)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda m, q, kv, qo, ko: None, "there is padding, expected a tensor"),
        (_dense, "dense mask"),
        (lambda m, q, kv, qo, ko: m, "the whole mask has 6 columns, this layer has 4 keys"),
        (lambda m, q, kv, qo, ko: m[:, :kv], "the first 4 tokens"),
        (lambda m, q, kv, qo, ko: m[:, qo : qo + q], "columns of the queries"),
        (lambda m, q, kv, qo, ko: m[:, ko:kv], "expected shape"),
        (lambda m, q, kv, qo, ko: ~m[:, ko : ko + kv], "inverted"),
        (lambda m, q, kv, qo, ko: m[:, ko : ko + kv].float(), "takes a bool mask"),
        (lambda m, q, kv, qo, ko: m[:, ko : ko + kv].flip(1), "for row 0"),
    ],
)
def test_layer_padding_names_the_mistake(cut, message):
    rejected(padding(cut), "layer_padding", message)


def test_layer_padding_must_take_what_it_does_not_need_and_know_none():
    def attempt(batch_size, q_length, kv_length, kv_offset, attention_mask):
        return attention_mask

    rejected(attempt, "layer_padding", r"end the signature with \*\*kwargs")

    def attempt(kv_length, kv_offset, attention_mask, **kwargs):
        return "all" if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length]

    rejected(attempt, "layer_padding", "expected None, got 'all'")


def test_layer_padding_other_ways_to_be_right():
    accepted(padding(lambda m, q, kv, qo, ko: m[:, -kv:].clone()), "layer_padding")

    def attempt(batch_size, kv_length, kv_offset, attention_mask, **kwargs):
        if attention_mask is None:
            return torch.ones(batch_size, kv_length, dtype=torch.bool)
        return attention_mask.narrow(1, kv_offset, kv_length)

    accepted(attempt, "layer_padding")


# ----------------------------------------------------------------------------------------------------- influence


def _gradient(run, embeddings, value):
    leaf = embeddings.detach().requires_grad_()
    return torch.autograd.grad(value(run(leaf)), leaf)[0][0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda run, x, first: 0.0, "expected a tensor"),
        (lambda run, x, first: _gradient(run, x, lambda y: y[:, first:].square().sum())[:first], "one number a token"),
        (lambda run, x, first: _gradient(run, x, lambda y: y[:, first:].square().sum()).norm(dim=-1), "before `first`"),
        (lambda run, x, first: _gradient(run, x, lambda y: y[:, first:].sum())[:2].norm(dim=-1), "expected shape"),
        (lambda run, x, first: _gradient(run, x, lambda y: y.square().sum())[:first].norm(dim=-1), "on itself"),
        (lambda run, x, first: _gradient(run, x, lambda y: y[:, :first].sum())[:first].norm(dim=-1), "on itself"),
        (lambda run, x, first: -_gradient(run, x, lambda y: y[:, first:].sum())[:first].norm(dim=-1), "cancel"),
        (lambda run, x, first: _gradient(run, x, lambda y: y[:, first:].sum())[:first].norm(dim=-1), "plain sum"),
        (
            lambda run, x, first: (
                _gradient(run, x, lambda y: y[:, first:].square().sum())[:first].norm(dim=-1).round(decimals=4)
            ),
            "weak path",
        ),
        (
            lambda run, x, first: _gradient(run, x, lambda y: y[:, first:].square().sum()).norm(dim=-1)[[1, 0, 2]],
            "only token 1",
        ),
    ],
)
def test_influence_names_the_mistake(wrong, message):
    rejected(wrong, "influence", message)


def test_influence_other_ways_to_be_right():
    def attempt(run, embeddings, first):
        embeddings.requires_grad_()
        out = run(embeddings)[0, first:]
        (out.double() ** 3).abs().sum().backward()
        return embeddings.grad[0, :first].abs().amax(-1).float()

    accepted(attempt, "influence")


# ------------------------------------------------------------------------------------- cu_seqlens_from_positions


def cumulated(positions, begins, front=True, back=True, dtype=torch.int32):
    """cu_seqlens from a (tokens,) bool that says where documents begin."""
    ends = begins.nonzero().flatten().tolist()
    return torch.tensor(([0] if front else []) + ends + ([positions.shape[1]] if back else []), dtype=dtype)


def steps(positions):
    return torch.cat([torch.zeros(1, dtype=torch.bool), positions[0].diff() != 1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda p: [0, p.shape[1]], "expected a tensor"),
        (lambda p: cumulated(p, steps(p))[None], "one dimension"),
        (lambda p: cumulated(p, steps(p), dtype=torch.int64), "takes int32, got torch.int64"),
        (lambda p: cumulated(p, steps(p)).diff(), "lengths, not ends"),
        (lambda p: cumulated(p, steps(p), back=False), "row's end is missing"),
        (lambda p: cumulated(p, steps(p), front=False), "0 in front is missing"),
        (lambda p: cumulated(p, steps(p), front=False, back=False), "both ends are missing"),
        (lambda p: cumulated(p, steps(p)[1:]), "one off"),
        (lambda p: torch.cat([cumulated(p, steps(p), back=False), torch.tensor([p.shape[1] - 1])]), "number of tokens"),
        (lambda p: cumulated(p, torch.cat([torch.zeros(1), p[0].diff()]) < 0), "one token is swallowed"),
        (lambda p: cumulated(p, p[0] == 0, front=False), "first document begins at token 0"),
        (lambda p: cumulated(p, (p[0] == 0) & (torch.arange(p.shape[1]) > 0)), "look for a step that is not"),
        (lambda p: torch.tensor([0, 2, 2], dtype=torch.int32), "rise strictly"),
        (lambda p: torch.tensor([0, 1, 2], dtype=torch.int32), r"expected \[0, 3, 5\] for positions"),
    ],
)
def test_cu_seqlens_from_positions_names_the_mistake(wrong, message):
    rejected(wrong, "cu_seqlens_from_positions", message)


def test_cu_seqlens_from_positions_other_ways_to_be_right():
    def attempt(position_ids):
        ends, values = [0], position_ids[0].tolist()
        for i in range(1, len(values)):
            if values[i] != values[i - 1] + 1:
                ends.append(i)
        return torch.IntTensor([*ends, len(values)])

    accepted(attempt, "cu_seqlens_from_positions")
