"""The definition of the 8-bit AdamW step, in torch operations.

Moments are kept as small floats with three fraction bits: the first as a sign and four exponent bits, the second, which
has no sign, as five. Each block of 256 elements has its own range of exponents, which ends at its largest element. They
are rounded stochastically: at beta2 = 0.999 a second moment changes by 0.1% a step, and rounding to the nearest of
these numbers, 6 to 12% apart, would never move it. As the numbers are the same in every range, what does not change is
kept.

Random numbers are a hash of (seed, step, parameter) and the element: they are the same on a CPU and a GPU, in every
order of updates and after a restart.

Source of 8-bit moments in blocks: Dettmers et al. 2021, arXiv 2110.02861; of stochastic rounding of weights: Zamirai et
al. 2020, arXiv 2010.06192.
"""

import torch

BLOCK = 256  # elements that share a range of exponents
FRACTION = 20  # low bits of an fp32 number that are rounded away: three of its 23 fraction bits stay
CODE_BITS = {"exp_avg": 7, "exp_avg_sq": 8}  # without the sign

# Multipliers of the integer hash triple32 of Chris Wellons' hash-prospector (public domain), and two odd numbers that
# make another uniform word of one (the fractional parts of the golden ratio and of sqrt(3), times 2^32).
HASH = (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB)
FIRST, SECOND = 0x9E3779B9, 0xBB67AE85


def keys(seed: int, step: int, parameter: int) -> tuple[int, int]:
    """Two numbers below 2^31 for the random numbers of one tensor's step; SplitMix64 (Steele et al. 2014)."""
    mask = (1 << 64) - 1
    state = 0
    for part in (seed, step, parameter):
        state = ((state ^ (part & mask)) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state & 0x7FFFFFFF, (state >> 32) & 0x7FFFFFFF


def _shift(x: torch.Tensor, places: int) -> torch.Tensor:
    """x >> places of 32-bit numbers without a sign, which torch has as int32."""
    return (x >> places) & ((1 << (32 - places)) - 1)


def _times(x: torch.Tensor, factor: int) -> torch.Tensor:
    """The low 32 bits of the product; int32 multiplication keeps them."""
    return x * (factor - (1 << 32) if factor >= 1 << 31 else factor)


def random_words(count: int, key: tuple[int, int], device: torch.device | str = "cpu") -> torch.Tensor:
    """(count,) int32: 32 uniform bits for each element."""
    x = torch.arange(count, dtype=torch.int32, device=device) + key[0]
    x = _times(x ^ _shift(x, 17), HASH[0])
    x = _times(x ^ _shift(x, 11) ^ key[1], HASH[1])
    x = _times(x ^ _shift(x, 15), HASH[2])
    return x ^ _shift(x, 14)


def decode(codes: torch.Tensor, exponents: torch.Tensor, name: str) -> torch.Tensor:
    """Moments in fp32.

    Args:
        codes: (blocks, 256) uint8. exponents: (blocks,) uint8, the fp32 exponent of each block's range's end.
        name: "exp_avg" or "exp_avg_sq".
    """
    bits = CODE_BITS[name]
    codes = codes.int()
    base = (8 * (exponents.int() + 1) - (1 << bits)).clamp(min=0)[:, None]
    code = codes & ((1 << bits) - 1)
    value = torch.where(code > 0, ((code + base) << FRACTION).view(torch.float32), 0.0)
    return torch.where(codes >> bits > 0, -value, value)


def encode(moments: torch.Tensor, random: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments to codes and exponents, so that they come back unchanged on average.

    What is below a block's range, 2^-15 and 2^-31 of its largest element, becomes 0 or the least number: a first moment
    by chance, a second one always the least number, for a step is divided by its root.

    Args:
        moments: (blocks, 256) fp32. random: (blocks, 256) int32 below 2^20. name: as in `decode`.
    """
    bits = CODE_BITS[name]
    size = moments.abs()
    number = size.view(torch.int32)
    exponents = ((number.amax(1) >> FRACTION) + 1) >> 3  # the largest may be rounded up to the next power of two
    base = (8 * (exponents + 1) - (1 << bits)).clamp(min=0)[:, None]
    code = ((number + random) >> FRACTION) - base
    if name == "exp_avg_sq":
        below = size > 0
    else:
        below = random.float() * 2.0**-FRACTION * ((base + 1) << FRACTION).view(torch.float32) < size
    code = torch.where((number >> FRACTION) <= base, below.int(), code)
    code = code | ((moments < 0).int() << bits)
    return code.to(torch.uint8), exponents.to(torch.uint8)


def round_stochastically(x: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """fp32 to bf16, up or down with the probability that keeps x on average. random: int32 below 2^16."""
    return ((x.view(torch.int32) + random) & -65536).view(torch.float32).to(torch.bfloat16)


def adamw_step(
    parameter, grad, exp_avg, exp_avg_exponent, exp_avg_sq, exp_avg_sq_exponent,
    step_size, root, eps, decay, betas, key, stochastic,
) -> torch.Tensor:  # fmt: skip
    """As `api.adamw_step` calls it: parameter and grad flat, codes (numel,), step_size = lr / (1 - beta1^t),
    root = 1 / sqrt(1 - beta2^t), decay = lr * weight_decay."""
    count = parameter.numel()
    rest = -count % BLOCK
    blocks = [torch.nn.functional.pad(x, (0, rest)).view(-1, BLOCK) for x in (grad.float(), exp_avg, exp_avg_sq)]
    g = blocks[0]
    word = random_words(count + rest, key, parameter.device).view(-1, BLOCK)
    m = betas[0] * decode(blocks[1], exp_avg_exponent, "exp_avg") + (1 - betas[0]) * g
    v = betas[1] * decode(blocks[2], exp_avg_sq_exponent, "exp_avg_sq") + (1 - betas[1]) * (g * g)
    for x, name, state, exponent, factor in (
        (m, "exp_avg", exp_avg, exp_avg_exponent, FIRST),
        (v, "exp_avg_sq", exp_avg_sq, exp_avg_sq_exponent, SECOND),
    ):
        codes, exponents = encode(x, _shift(_times(word, factor), 12), name)
        state.copy_(codes.view(-1)[:count])
        exponent.copy_(exponents)
    old = parameter.float()
    change = decay * old + step_size * (m / (v.sqrt() * root + eps)).view(-1)[:count]
    new = old - change
    if stochastic and parameter.dtype == torch.bfloat16:
        new = round_stochastically(new, (word & 0xFFFF).view(-1)[:count])
    parameter.copy_(new)
    return g.square().sum()
