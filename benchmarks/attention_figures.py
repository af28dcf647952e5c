"""What follows from a row of attention.csv: its documents, FLOPs, least bytes, rates, and ratios between contenders.

Rows are those of `attention.COLUMNS`, as measured (numbers) or as read from the file (strings). Times are in
milliseconds, `part` is "forward", "backward" or "total" (both).
"""

import random
from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]
PARTS = ("forward", "backward", "total")
# What has to be the same in rows that are shown together, and besides it in rows of one run.
SETTING = ("gpu", "dtype", "heads", "kv_heads", "head_dim")
RUN = (*SETTING, "commit", "torch", "triton")


def document_lengths(tokens: int, documents: str) -> tuple[int, ...]:
    """Lengths of the documents that `tokens` tokens are packed as.

    Args:
        tokens: their sum, at least the number of documents.
        documents: "4": four, as equal as can be; "4u": four unequal ones, cut at places drawn with a fixed seed
            (`random.Random.random` alone: it yields the same numbers in every version of Python).
    """
    count = int(documents.removesuffix("u"))
    if not documents.endswith("u"):
        return tuple(tokens // count + (index < tokens % count) for index in range(count))
    generator, cuts = random.Random(0), set()
    while len(cuts) < count - 1:
        cuts.add(1 + int(generator.random() * (tokens - 1)))
    ends = [0, *sorted(cuts), tokens]
    return tuple(end - start for start, end in zip(ends, ends[1:], strict=False))


def visible_pairs(lengths: Iterable[int], window: int) -> int:
    """(query, key) pairs that causal attention computes within documents of these lengths; window 0 is a full layer."""
    pairs = 0
    for length in lengths:
        reach = min(window or length, length)
        pairs += reach * (reach + 1) // 2 + (length - reach) * reach
    return pairs


def row_pairs(row: Row) -> int:
    """visible_pairs of a row, one head."""
    return visible_pairs(document_lengths(int(row["tokens"]), str(row["documents"])), int(row["window"]))


def flops(row: Row, part: str) -> float:
    """FLOPs of the matrix products: two forward, five backward (the scores again), 2 * head_dim a visible pair."""
    products = {"forward": 2, "backward": 5, "total": 7}[part]
    return products * 2 * row_pairs(row) * int(row["head_dim"]) * int(row["heads"])


def least_bytes(row: Row, part: str) -> int:
    """Bytes that have to cross the memory bus: each input read once, each output written once; lse is fp32.

    Forward: q, k, v, out, lse. Backward: q, k, v, out, dout, lse in, dq, dk, dv out.
    """
    tokens, heads = int(row["tokens"]), int(row["heads"])
    size = {"bfloat16": 2, "float16": 2, "float32": 4}[row["dtype"]]
    query = tokens * heads * int(row["head_dim"]) * size
    key = tokens * int(row["kv_heads"]) * int(row["head_dim"]) * size
    forward, backward = 2 * query + 2 * key, 4 * query + 4 * key
    lse = tokens * heads * 4
    return {"forward": forward + lse, "backward": backward + lse, "total": forward + backward + 2 * lse}[part]


def tflops(row: Row, part: str) -> float:
    """TFLOP/s that a row's time amounts to."""
    return flops(row, part) / float(row[f"{part}_ms"]) / 1e9


def gbs(row: Row, part: str) -> float:
    """GB/s (1e9 bytes) that a row's time amounts to if it moved its least bytes alone."""
    return least_bytes(row, part) / float(row[f"{part}_ms"]) / 1e6


def intensity(row: Row, part: str) -> float:
    """FLOPs for each of the least bytes."""
    return flops(row, part) / least_bytes(row, part)


def settings(rows: Iterable[Row], keys: tuple[str, ...] = SETTING) -> dict[tuple, list[Row]]:
    """The rows by what `keys` say of them; within one, the newest row of each contender, length, window, documents.

    Rows are given in the order of measurement: later ones replace earlier ones.
    """
    found: dict[tuple, dict[tuple, Row]] = {}
    for row in rows:
        place = tuple(str(row[key]) for key in ("contender", "tokens", "window", "documents"))
        found.setdefault(tuple(str(row[key]) for key in keys), {})[place] = row
    return {setting: list(places.values()) for setting, places in found.items()}


def comparable(rows: Iterable[Row]) -> list[Row]:
    """The rows of the run (one commit, GPU and setting) in which ours and another contender share most lengths and
    windows, of one document each; of two with as many, the newer one."""
    best, most = [], 1
    for run in settings(rows, RUN).values():
        places = {True: set(), False: set()}
        for row in run:
            if str(row["documents"]) == "1":
                places[row["contender"] == "ours"].add((str(row["tokens"]), str(row["window"])))
        shared = len(places[True] & places[False])
        if shared >= most:
            best, most = run, shared
    return best


def layer_times(rows: Iterable[Row]) -> dict[tuple[int, str], dict[str, float]]:
    """Forward + backward, one document: (tokens, layer) -> contender -> ms, from the rows of one run.

    Layers are "full", "window N", and "full + window N": one of each, what gpt-oss alternates.
    """
    found: dict[tuple[int, str], dict[str, float]] = {}
    for row in rows:
        if str(row["documents"]) == "1":
            layer = f"window {row['window']}" if int(row["window"]) else "full"
            found.setdefault((int(row["tokens"]), layer), {})[row["contender"]] = float(row["total_ms"])
    for (tokens, layer), times in list(found.items()):
        full = found.get((tokens, "full"), {})
        both = {name: full[name] + time for name, time in times.items() if name in full}
        if layer != "full" and both:
            found[tokens, f"full + {layer}"] = both
    return dict(sorted(found.items(), key=lambda item: (item[0][0], "+" in item[0][1], item[0][1])))


def ratios(times: Mapping[tuple[int, str], Mapping[str, float]]) -> dict[str, dict[str, tuple[float, float]]]:
    """layer -> contender -> least and most that its time is of ours, over the lengths that both have."""
    found: dict[str, dict[str, list[float]]] = {}
    for (_, layer), contenders in times.items():
        for name, time in contenders.items():
            if name != "ours" and "ours" in contenders:
                found.setdefault(layer, {}).setdefault(name, []).append(time / contenders["ours"])
    return {layer: {name: (min(x), max(x)) for name, x in names.items()} for layer, names in found.items()}


def predicted_ms(row: Row, rows: Iterable[Row]) -> float | None:
    """Forward + backward time of a packed row if it followed the visible pairs, from its one-document row in `rows`.

    In a full layer those go with the sum of the squares of the lengths. None: `rows` have no such row.
    """
    same = ("contender", "tokens", "window", *RUN)
    for one in rows:
        if str(one["documents"]) == "1" and all(str(one[key]) == str(row[key]) for key in same):
            return float(one["total_ms"]) * row_pairs(row) / row_pairs(one)
    return None
