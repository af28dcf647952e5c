"""What `python -m benchmarks.sanitize judge` makes of what racecheck prints."""

from pathlib import Path

from benchmarks.sanitize import judge

SOURCE = Path(__file__).parents[2] / "gptoss_kernels" / "attention" / "hopper.py"


def lines(start: str) -> list[int]:
    return [n for n, line in enumerate(SOURCE.read_text().splitlines(), 1) if line.strip().startswith(start)]


def log(
    read: int, write: int, end: str = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"
) -> str:
    kernel = "forward_hopper_kernel"
    return (
        f"========= Error: Race reported between Read access at {kernel}+0x210 in hopper.py:{read}\n"
        f"=========     and Write access at {kernel}+0xd660 in hopper.py:{write} [29 hazards]\n{end}\n"
    )


def test_the_hand_over_is_counted_and_nothing_else_passes():
    (define,), hand = lines("def forward_hopper_kernel("), lines("gl.warp_specialize(")[0]
    assert judge(log(define, hand)) == ({"forward_hopper_kernel": 1}, [])
    for read, write in ((define, hand + 1), (define + 1, hand), (define, 10**6)):
        handed, others = judge(log(read, write))
        assert not handed and len(others) == 1


def test_other_findings_and_an_unfinished_log_do_not_pass():
    assert judge("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)") == ({}, [])
    assert judge("")[1] == ["racecheck did not finish"]
    assert judge(log(1, 1, end=""))[1]
    assert judge("========= Error: Potential WAR hazard\n========= RACECHECK SUMMARY: 1 hazard displayed")[1]
