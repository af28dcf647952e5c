"""How benchmarks/fuzz.py spreads its calls over processes, and that what is wrong is found and named."""

import math

from benchmarks import fuzz
from gptoss_kernels import fuzz as calls


def test_each_seed_is_in_one_group_of_like_calls():
    groups = fuzz.chunks(range(5, 3005), 20)
    assert sorted(seed for group in groups for seed in group) == list(range(5, 3005))
    assert max(map(len, groups)) <= 200
    for group in groups:
        assert len({fuzz.kernels(fuzz.draw(seed, 20)) for seed in group}) == 1


def test_a_failure_is_named_by_its_seed(monkeypatch):
    shares = {"attention": 0.25, "experts": 0.5}

    def check(name):
        def judge(call, device):
            assert not (name == "experts" and call == fuzz.draw(7, 20)), "too far off"
            return shares[name]

        return judge

    monkeypatch.setattr(calls, "check_attention", check("attention"))
    monkeypatch.setattr(calls, "check_experts", check("experts"))
    done, worst, failures = fuzz.run(list(range(12)), 20, math.inf)
    assert done == {"attention": 9, "experts": 3} and worst == 0.5
    assert len(failures) == 1 and failures[0].startswith("seed 7: AssertionError: too far off")
    assert fuzz.run(list(range(12)), 20, 0.0)[0].total() == 0  # its time is up
