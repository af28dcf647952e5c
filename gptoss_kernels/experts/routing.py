"""From router indices to rows sorted by expert, and grouped matrix products over them, without a host sync on a GPU."""

from typing import NamedTuple

import torch

from ..backends import capability


class Routing(NamedTuple):
    """Slots (token, choice) in the order of their experts. rows = tokens * top_k; slots whose index is no expert
    (the sentinel) come last, past ends[-1], and are read by nobody."""

    token: torch.Tensor  # (rows,) int32, the token of each sorted row
    slot: torch.Tensor  # (rows,) int64, token * top_k + choice of each sorted row
    expert: torch.Tensor  # (rows,) int32, sorted
    row: torch.Tensor  # (tokens, top_k) int32, the sorted row of each slot
    ends: torch.Tensor  # (experts,) int32, one past each expert's last row


def route(router_indices: torch.Tensor, experts: int) -> Routing:
    """Stable, so that the rows of an expert are in the order of their tokens; no value is read on the host."""
    tokens, top_k = router_indices.shape
    expert, slot = router_indices.reshape(-1).to(torch.int32).sort(stable=True)
    numbers = torch.arange(max(experts, slot.numel()), dtype=torch.int32, device=slot.device)
    row = torch.empty_like(expert)
    row[slot] = numbers[: slot.numel()]  # a permutation: every element is written once
    ends = torch.searchsorted(expert, numbers[:experts], right=True, out_int32=True)
    return Routing((slot // top_k).to(torch.int32), slot, expert, row.view(tokens, top_k), ends)


def grouped_product(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Each expert's rows times its matrix: a (rows, n), b (experts, n, m) -> (rows, m), undefined past ends[-1]."""
    if _has_grouped_mm(a):
        return torch.nn.functional.grouped_mm(_aligned(a), _aligned(b), offs=ends)
    out = a.new_empty(a.shape[0], b.shape[-1])
    for expert, (begin, end) in enumerate(_bounds(ends)):
        torch.matmul(a[begin:end], b[expert], out=out[begin:end])
    return out


def grouped_outer(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Each expert's rows of a transposed times those of b: (rows, n), (rows, m) -> (experts, n, m)."""
    if _has_grouped_mm(a):
        return torch.nn.functional.grouped_mm(_aligned(a).transpose(0, 1), _aligned(b), offs=ends)
    out = a.new_zeros(ends.shape[0], a.shape[1], b.shape[1])
    for expert, (begin, end) in enumerate(_bounds(ends)):
        if end > begin:
            torch.matmul(a[begin:end].transpose(0, 1), b[begin:end], out=out[expert])
    return out


def _has_grouped_mm(a: torch.Tensor) -> bool:
    return a.is_cuda and a.dtype == torch.bfloat16 and capability(a.get_device()) >= (8, 0)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x, copied if it does not begin at a multiple of 16 bytes, as TMA needs: ZeRO-3 gathers weights one behind
    another, and one before them may have any size."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _bounds(ends: torch.Tensor) -> list[tuple[int, int]]:
    stops = ends.tolist()
    return list(zip([0, *stops[:-1]], stops, strict=True))
