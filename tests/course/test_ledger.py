"""What is written and what is kept, counted on functions whose numbers are known."""

import torch

from gptoss_kernels.course.ledger import Ledger, kept_bytes


def test_ledger_counts_what_is_written():
    a, b = torch.ones(4, 8), torch.ones(8, 2)
    with Ledger() as book:
        product = a @ b  # 8 numbers
        (product.view(2, 4).T + 1).mul_(2)  # a view, a new tensor, the same again
    assert book.calls == {"products": 1, "rest": 2} and book.bytes == {"products": 32, "rest": 64}


def test_kept_bytes_counts_each_storage_once():
    x = torch.ones(8, requires_grad=True)
    assert kept_bytes(lambda: x * x) == 32
    assert kept_bytes(lambda: (x * x, x[:4] * x[4:])) == 32
    assert kept_bytes(lambda: x * x, ignore=[x]) == 0
    assert kept_bytes(lambda: x.exp().sin()) == 32  # exp's result, which both derivatives want, and nothing of x
