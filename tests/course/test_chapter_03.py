"""Chapter 03's checkers name the mistake of a wrong attempt and accept right ones that are written differently."""

import math

import pytest
import torch

from gptoss_kernels.course import check
from gptoss_kernels.course.solutions import chapter_03


def attempt(function, name):
    function.__name__ = name
    return check.attempt(function, chapter=3, strict=True)


def wrong(function, name, message):
    with pytest.raises(check.Mistake, match=message):
        attempt(function, name)


# ---------------------------------------------------------------------------------------------- expected_rescales


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda n: sum(1 / j for j in range(1, n + 1)), "the first key sets the maximum"),
        (lambda n: math.log(n), "how the sum grows"),
        (lambda n: 1 / n, "the last key alone"),
        (lambda n: (n - 1) / 2, "not every second key"),
        (lambda n: sum(1 / j for j in range(2, n)), "one key too early"),
        (lambda n: n - 1, "expected 0.5000 for 2 keys, got 1.0000"),
        (lambda n: None, "expected a number for 1 keys, got NoneType"),
    ],
)
def test_expected_rescales_names_the_mistake(function, message):
    wrong(function, "expected_rescales", message)


def test_expected_rescales_accepts_a_tensor():
    attempt(lambda n: (1 / torch.arange(1, n + 1)).sum() - 1, "expected_rescales")


# -------------------------------------------------------------------------------------------------- online_update


def update(
    rescale_acc=True,
    rescale_sum=True,
    factor=lambda old, new: torch.exp(old - new),
    new_max=lambda old, scores: torch.maximum(old, scores.amax(-1)),
    relative_to=lambda new, scores: new,
    weights=lambda scores, m: torch.exp(scores - m[..., None]),
    returned=lambda acc, new, summed, old: (acc, new, summed),
    keep=True,
):
    """online_update, of which one part can be replaced."""

    def online_update(acc, running_max, running_sum, scores, v_tile):
        new = new_max(running_max, scores)
        p = weights(scores, relative_to(new, scores))
        rescale = factor(running_max, new)
        acc = keep * acc * (rescale[..., None] if rescale_acc else 1) + p @ v_tile
        summed = keep * running_sum * (rescale if rescale_sum else 1) + p.sum(-1)
        return returned(acc, new, summed, running_max)

    return online_update


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (update(rescale_acc=False), "^acc is not rescaled"),
        (update(rescale_sum=False), "^running_sum is not rescaled"),
        (update(rescale_acc=False, rescale_sum=False), "neither running_sum nor acc"),
        (update(factor=lambda old, new: torch.exp(new - old)), "upside down"),
        (update(relative_to=lambda new, scores: scores.amax(-1)), "relative to this tile's maximum"),
        (update(new_max=lambda old, scores: scores.amax(-1)), "the running maximum counts too"),
        (update(weights=lambda scores, m: torch.softmax(scores, -1)), "normalised within the tile"),
        (update(returned=lambda a, m, s, old: (a / s[..., None], m, s)), "comes once, after the last tile"),
        (update(returned=lambda a, m, s, old: (a, old, s)), "the old maximum is returned"),
        (update(keep=False), "the new keys replace the old ones"),
        (update(new_max=lambda old, scores: torch.maximum(old, scores.amax())), "a maximum of its own"),
        (update(returned=lambda a, m, s, old: (m, s, a)), "the order is acc, running_max, running_sum"),
        (update(returned=lambda a, m, s, old: (a, s)), "expected three tensors .* got 2 values"),
        (update(returned=lambda a, m, s, old: a), "expected three tensors .* got Tensor"),
        (update(returned=lambda a, m, s, old: (a, m, 1.0)), "running_sum: expected a tensor .* got float"),
        (update(returned=lambda a, m, s, old: (2 * a, m, s)), r"acc of row 0: expected \[.*\], got \["),
        (update(weights=lambda s, m: torch.softmax(s, -1) * s.sub(m[..., None]).exp().sum(-1)[..., None]), "must keep"),
        (
            update(
                weights=lambda scores, m: torch.exp(scores) / torch.exp(m)[..., None],
                factor=lambda old, new: torch.exp(old) / torch.exp(new).clamp_min(1e-300),
            ),
            "large scores overflow",
        ),
    ],
)
def test_online_update_names_the_mistake(function, message):
    wrong(function, "online_update", message)


def test_online_update_with_one_sum_for_all_rows():
    def online_update(acc, running_max, running_sum, scores, v_tile):
        acc, new_max, _ = chapter_03.online_update(acc, running_max, running_sum, scores, v_tile)
        p = torch.exp(scores - new_max[..., None])
        return acc, new_max, running_sum * torch.exp(running_max - new_max) + p.sum()

    wrong(online_update, "online_update", "a sum of its own")


def test_online_update_that_counts_dimensions_from_the_front():
    def online_update(acc, running_max, running_sum, scores, v_tile):
        new_max = torch.maximum(running_max, scores.amax(-1))
        p = torch.exp(scores - new_max[..., None])
        rescale = torch.exp(running_max - new_max)
        summed = running_sum * rescale + p.sum(1) if scores.dim() == 2 else running_sum
        return acc * rescale[..., None] + p @ v_tile, new_max, summed

    wrong(online_update, "online_update", "leading batch dimension")


def test_online_update_accepts_in_place_and_fp32():
    def online_update(acc, running_max, running_sum, scores, v_tile):
        new_max = scores.max(dim=-1).values.maximum(running_max)
        rescale = (running_max - new_max).exp_()
        p = scores.sub_(new_max.unsqueeze(-1)).exp_()
        running_sum.mul_(rescale).add_(p.sum(-1))
        acc.mul_(rescale.unsqueeze(-1)).add_(torch.einsum("...mn,...nd->...md", p, v_tile))
        return [x.float() for x in (acc, new_max, running_sum)]

    attempt(online_update, "online_update")


# --------------------------------------------------------------------------------------------------- merge_states


def merge(
    factors=lambda a, b, m: (torch.exp(a - m), torch.exp(b - m)),
    acc_too=True,
    sum_too=True,
    new_max=torch.maximum,
    after=lambda acc, m, s: (acc, m, s),
):
    """merge_states, of which one part can be replaced."""

    def merge_states(first, second):
        (acc_1, max_1, sum_1), (acc_2, max_2, sum_2) = first, second
        common = torch.maximum(max_1, max_2)
        f_1, f_2 = factors(max_1, max_2, common)
        acc = acc_1 * f_1[..., None] + acc_2 * f_2[..., None] if acc_too else acc_1 + acc_2
        summed = sum_1 * f_1 + sum_2 * f_2 if sum_too else sum_1 + sum_2
        return after(acc, new_max(max_1, max_2), summed)

    return merge_states


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (merge(acc_too=False, sum_too=False), "neither state is rescaled"),
        (merge(factors=lambda a, b, m: (torch.ones_like(m), torch.exp(b - m))), "only the second state is rescaled"),
        (merge(factors=lambda a, b, m: (torch.exp(a - m), torch.ones_like(m))), "only the first state is rescaled"),
        (merge(factors=lambda a, b, m: (torch.exp(b - m), torch.exp(a - m))), "the factors are swapped"),
        (merge(factors=lambda a, b, m: (torch.exp(m - a), torch.exp(m - b))), "upside down"),
        (merge(sum_too=False), "^running_sum is not rescaled"),
        (merge(acc_too=False), "^acc is not rescaled"),
        (merge(after=lambda a, m, s: (a / s[..., None], m, s)), "stays unnormalised"),
        (merge(new_max=torch.add), "maxima do not add up"),
        (merge(after=lambda a, m, s: (a / 2, m, s / 2)), "averaged"),
        (merge(after=lambda a, m, s: (a, m, 3 * s)), "running_sum of row 0: expected"),
        (merge(after=lambda a, m, s: a), "expected three tensors"),
        (merge(after=lambda a, m, s: (m, s, a)), "the order is acc, running_max, running_sum"),
        (
            merge(factors=lambda a, b, m: (torch.exp(a) / torch.exp(m), torch.exp(b) / torch.exp(m))),
            "large maxima overflow",
        ),
        (merge(after=lambda a, m, s: (a, m, s.clamp_min(1.0))), "two empty states"),
    ],
)
def test_merge_states_names_the_mistake(function, message):
    wrong(function, "merge_states", message)


def test_merge_states_with_an_empty_part():
    def merge_states(first, second):
        merged = chapter_03.merge_states(first, second)
        return tuple(x + (second[2].max() == 0) for x in merged)

    wrong(merge_states, "merge_states", "where the second state is the empty one")


def test_merge_states_accepts_another_way():
    def merge_states(first, second):
        maxima = torch.stack([first[1], second[1]])
        common = maxima.amax(0)
        factors = (maxima - common).exp()
        acc = (torch.stack([first[0], second[0]]) * factors[..., None]).sum(0)
        return acc, common, (torch.stack([first[2], second[2]]) * factors).sum(0)

    attempt(merge_states, "merge_states")


# ------------------------------------------------------------------------------------------ recover_probabilities


def masked(scores, diagonal=None):
    q_len, kv_len = scores.shape
    allowed = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len if diagonal is None else diagonal)
    return scores.masked_fill(~allowed, -torch.inf)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda q, k, lse, scale: torch.exp(q @ k.mT * scale - lse[:, None]), "the mask is missing"),
        (lambda q, k, lse, scale: torch.exp(masked(q @ k.mT) - lse[:, None]), "not scaled"),
        (lambda q, k, lse, scale: torch.softmax(masked(q @ k.mT * scale), -1), "without the sink"),
        (lambda q, k, lse, scale: masked(q @ k.mT * scale) - lse[:, None], "apply exp"),
        (
            lambda q, k, lse, scale: torch.exp(masked(q @ k.mT * scale, len(k) - len(q) - 1) - lse[:, None]),
            "sees its own key",
        ),
        (lambda q, k, lse, scale: torch.exp(masked(q @ k.mT * scale)) / lse[:, None], "divide by exp"),
        (lambda q, k, lse, scale: torch.exp(masked(q @ k.mT * scale)), "the normaliser is missing"),
        (lambda q, k, lse, scale: torch.exp(masked(q @ k.mT - lse[:, None]) * scale), "lse is scaled already"),
        (lambda q, k, lse, scale: torch.exp(masked(q @ k.mT * scale, 0) - lse[:, None]), "the last query stands"),
        (
            lambda q, k, lse, scale: torch.exp(
                masked(q @ k.mT * scale) - (lse[None, :] if len(q) == len(k) else lse[:, None])
            ),
            "lse belongs to the queries",
        ),
        (lambda q, k, lse, scale: 2 * torch.exp(masked(q @ k.mT * scale) - lse[:, None]), "for query 0 and key 0, got"),
        (lambda q, k, lse, scale: q @ k.mT @ k, "expected shape"),
        (lambda q, k, lse, scale: 1.0, "expected a tensor"),
    ],
)
def test_recover_probabilities_names_the_mistake(function, message):
    wrong(function, "recover_probabilities", message)


def test_recover_probabilities_accepts_another_way():
    def recover_probabilities(q, k, lse, scale):
        scores = torch.einsum("id,jd->ij", q * scale, k)
        ones = torch.ones_like(scores)
        return ((scores.T - lse).T.exp() * ones.tril(k.shape[0] - q.shape[0])).float()

    attempt(recover_probabilities, "recover_probabilities")
