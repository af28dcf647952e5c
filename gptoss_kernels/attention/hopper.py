"""The attention kernels for Hopper in Gluon: one warp feeds shared memory by TMA, warp groups multiply out of it.

Same mathematics, masks and results as forward.py and backward.py, for what gpt-oss is trained with: bf16 or fp16 and
head_dim 64. A warp group owns 64 rows of its program's tile (queries in the forward and dQ kernels, keys in the dK/dV
kernel) and meets the others only at the barriers of shared memory: while one exponentiates, another multiplies.
Barriers come in pairs a stage: `full` when TMA has filled it, `empty` when each warp group has given it back.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .masks import VARYING

async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name in Triton 3.6

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
LOWEST = gl.constexpr(-1.0e38)  # as in forward.py
HEAD_DIM = gl.constexpr(64)
WIDTH = gl.constexpr(64)  # rows of a warp group, which is what one wgmma takes
GROUPS = gl.constexpr(3)  # warp groups that multiply
TILE = gl.constexpr(192)  # GROUPS * WIDTH


@gluon.constexpr_function
def product(columns):
    """Registers of a product of one warp group, (64, columns)."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def document_bounds(cu_seqlens, token, documents, search_steps):
    """As in masks.py, in Gluon: start and end of the packed document that holds each token."""
    low = token * 0
    high = low + documents
    for _ in range(search_steps):
        middle = (low + high) // 2
        below = gl.load(cu_seqlens + middle) <= token
        low = gl.where(below, middle, low)
        high = gl.where(below, high, middle)
    return gl.load(cu_seqlens + low), gl.load(cu_seqlens + low + 1)


@gluon.jit
def first_key(position, bounds, HAS_WINDOW: gl.constexpr, PACKED: gl.constexpr):
    """Oldest key that a query at each position sees; it never falls as the position rises."""
    cu_seqlens, window, documents, search_steps = bounds
    first = position * 0
    if HAS_WINDOW:
        first = gl.maximum(first, position - window + 1)
    if PACKED:
        start, _ = document_bounds(cu_seqlens, position, documents, search_steps)
        first = gl.maximum(first, start)
    return first


@gluon.jit
def query_end(key, q_len, offset, bounds, HAS_WINDOW: gl.constexpr, PACKED: gl.constexpr):
    """One past the newest query row that sees each key; it never falls as the key rises."""
    cu_seqlens, window, documents, search_steps = bounds
    end = key * 0 + q_len
    if HAS_WINDOW:
        end = gl.minimum(end, key + window - offset)
    if PACKED:
        _, stop = document_bounds(cu_seqlens, key, documents, search_steps)
        end = gl.minimum(end, stop)
    return end


@gluon.jit
def barriers(count: gl.constexpr, arrivals: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(bars.index(i), count=arrivals)
    return bars


@gluon.jit
def give_back(full, empty, step, STAGES: gl.constexpr):
    """Wait for a tile that only other warp groups need, and give it back. A tile that did not come would be counted
    for the one before it."""
    mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
    mbarrier.arrive(empty.index(step % STAGES), count=1)


# ------------------------------------------------------------------------------------------------------- forward


@gluon.jit
def forward_load(descriptors, smem, full, empty, span, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    q_desc, k_desc, v_desc = descriptors
    q_smem, k_smem, v_smem = smem
    full_q, full_k, full_v = full
    empty_k, empty_v = empty
    batch, head, kv_head, start_m, begin, end = span
    mbarrier.expect(full_q.index(0), TILE * HEAD_DIM * 2)
    for part in gl.static_range(GROUPS):
        async_load(q_desc, [batch, head, start_m + part * WIDTH, 0], full_q.index(0), q_smem.index(part))
    step = 0
    for start_n in range(begin, end, BLOCK_N):
        stage = step % STAGES
        phase = ((step // STAGES) & 1) ^ 1
        mbarrier.wait(empty_k.index(stage), phase)
        mbarrier.expect(full_k.index(stage), BLOCK_N * HEAD_DIM * 2)
        async_load(k_desc, [batch, kv_head, start_n, 0], full_k.index(stage), k_smem.index(stage))
        mbarrier.wait(empty_v.index(stage), phase)
        mbarrier.expect(full_v.index(stage), BLOCK_N * HEAD_DIM * 2)
        async_load(v_desc, [batch, kv_head, start_n, 0], full_v.index(stage), v_smem.index(stage))
        step += 1


@gluon.jit
def mask(
    x, start_n, column, limits, padding, kv_len, hidden: gl.constexpr, BOUNDED: gl.constexpr, PADDED: gl.constexpr
):
    """A tile [WIDTH, keys] with `hidden` where a query does not see a key; most tiles are seen whole."""
    lowest, newest, position, first = limits
    key = start_n + column
    # Two bounds, each of which cuts through few tiles.
    if start_n + column.shape[0] - 1 > lowest:
        x = gl.where(key[None, :] <= position[:, None], x, hidden)
    if BOUNDED:
        if start_n < newest:
            x = gl.where(key[None, :] >= first[:, None], x, hidden)
    if PADDED:
        real = gl.load(padding + key, mask=(key >= 0) & (key < kv_len), other=0) != 0
        x = gl.where(real[None, :], x, hidden)
    return x


@gluon.jit
def row_limits(start, q_len, offset, bounds, layout: gl.constexpr, HAS_WINDOW: gl.constexpr, PACKED: gl.constexpr):
    """Of the WIDTH rows from start: position of the first, newest of their oldest keys; positions, oldest keys."""
    lowest = gl.minimum(start, q_len - 1) + offset
    highest = gl.minimum(start + WIDTH - 1, q_len - 1) + offset
    newest = first_key(highest, bounds, HAS_WINDOW, PACKED)
    position = gl.minimum(start + gl.arange(0, WIDTH, layout=layout), q_len - 1) + offset
    return lowest, newest, position, first_key(position, bounds, HAS_WINDOW, PACKED)


@gluon.jit
def softmax_step(scores, running_max, running_sum, qk_scale):
    new_max = gl.maximum(running_max, gl.max(scores, 1) * qk_scale)
    p = gl.exp2(scores * qk_scale - new_max[:, None])
    rescale = gl.exp2(running_max - new_max)
    return p, new_max, running_sum * rescale + gl.sum(p, 1), rescale


@gluon.jit
def start_softmax(sinks, head, layout: gl.constexpr, HAS_SINKS: gl.constexpr):
    """Maximum and sum before the first key: the sink is key -1, with score z and no value."""
    running_max = gl.full([WIDTH], LOWEST, gl.float32, layout=layout)
    running_sum = gl.zeros([WIDTH], gl.float32, layout=layout)
    if HAS_SINKS:
        z = gl.load(sinks + head).to(gl.float32) * LOG2E
        running_max = gl.maximum(running_max, z)
        running_sum = gl.exp2(z - running_max)
    return running_max, running_sum


@gluon.jit
def store_out(out, lse, acc, running_max, running_sum, start, q_len, stride_om):
    # Neither key nor sink: sum = 0, o = 0, lse = -inf.
    unseeing = running_sum == 0.0
    running_sum = gl.where(unseeing, 1.0, running_sum)
    row_lse = gl.where(unseeing, float("-inf"), (running_max + gl.log2(running_sum)) * LN2)
    row = start + gl.arange(0, WIDTH, layout=running_sum.type.layout)
    gl.store(lse + row, row_lse, mask=row < q_len)
    layout: gl.constexpr = acc.type.layout
    row = start + gl.arange(0, WIDTH, layout=gl.SliceLayout(1, layout))
    d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, layout))
    acc = acc / gl.convert_layout(running_sum, gl.SliceLayout(1, layout))[:, None]
    target = out + row.to(gl.int64)[:, None] * stride_om + d[None, :]
    gl.store(target, acc.to(out.dtype.element_ty), mask=(row < q_len)[:, None])


@gluon.jit
def forward_multiply(
    smem, full, empty, span, bounds, pointers, numbers,
    PART: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HAS_SINKS: gl.constexpr,
    HAS_WINDOW: gl.constexpr, PACKED: gl.constexpr, PADDED: gl.constexpr,
):  # fmt: skip
    q_smem, k_smem, v_smem = smem
    full_q, full_k, full_v = full
    empty_k, empty_v = empty
    batch, head, kv_head, start_m, begin, end = span
    out, lse, sinks, padding = pointers
    stride_om, q_len, kv_len, qk_scale = numbers
    BOUNDED: gl.constexpr = HAS_WINDOW or PACKED
    scores_layout: gl.constexpr = product(BLOCK_N)
    out_layout: gl.constexpr = product(HEAD_DIM)
    rows_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    operand: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)

    offset = kv_len - q_len
    start = start_m + PART * WIDTH
    limits = row_limits(start, q_len, offset, bounds, rows_layout, HAS_WINDOW, PACKED)
    lowest, newest, position, first = limits
    own = first_key(lowest, bounds, HAS_WINDOW, PACKED) // BLOCK_N * BLOCK_N
    own_end = gl.cdiv(gl.minimum(start + WIDTH, q_len) + offset, BLOCK_N) * BLOCK_N
    own_end = gl.maximum(own_end, own + BLOCK_N)
    column = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, scores_layout))
    zero = gl.zeros([WIDTH, BLOCK_N], gl.float32, layout=scores_layout)
    acc = gl.zeros([WIDTH, HEAD_DIM], gl.float32, layout=out_layout)
    running_max, running_sum = start_softmax(sinks, head, rows_layout, HAS_SINKS)

    mbarrier.wait(full_q.index(0), 0)
    q_tile = q_smem.index(PART).reshape([WIDTH, HEAD_DIM])
    step = 0
    for _ in range(begin, own, BLOCK_N):
        give_back(full_k, empty_k, step, STAGES)
        give_back(full_v, empty_v, step, STAGES)
        step += 1
    stage = step % STAGES
    mbarrier.wait(full_k.index(stage), (step // STAGES) & 1)
    k_tile = k_smem.index(stage).reshape([BLOCK_N, HEAD_DIM])
    scores = warpgroup_mma(q_tile, k_tile.permute([1, 0]), zero, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(empty_k.index(stage), count=1)
    scores = mask(scores, own, column, limits, padding, kv_len, float("-inf"), BOUNDED, PADDED)
    p, running_max, running_sum, rescale = softmax_step(scores, running_max, running_sum, qk_scale)
    p = gl.convert_layout(p.to(q_smem.dtype), operand)
    step += 1
    for start_n in range(own + BLOCK_N, own_end, BLOCK_N):
        # Scores of this tile and values of the one before, so that the exponentials overlap with the latter.
        stage = step % STAGES
        before = (step - 1) % STAGES
        mbarrier.wait(full_k.index(stage), (step // STAGES) & 1)
        k_tile = k_smem.index(stage).reshape([BLOCK_N, HEAD_DIM])
        scores = warpgroup_mma(q_tile, k_tile.permute([1, 0]), zero, use_acc=False, is_async=True)
        mbarrier.wait(full_v.index(before), ((step - 1) // STAGES) & 1)
        acc = warpgroup_mma(p, v_smem.index(before).reshape([BLOCK_N, HEAD_DIM]), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(empty_k.index(stage), count=1)
        scores = mask(scores, start_n, column, limits, padding, kv_len, float("-inf"), BOUNDED, PADDED)
        next_p, running_max, running_sum, rescale = softmax_step(scores, running_max, running_sum, qk_scale)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty_v.index(before), count=1)
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, out_layout))[:, None]
        p = gl.convert_layout(next_p.to(q_smem.dtype), operand)
        step += 1
    before = (step - 1) % STAGES
    mbarrier.wait(full_v.index(before), ((step - 1) // STAGES) & 1)
    acc = warpgroup_mma(p, v_smem.index(before).reshape([BLOCK_N, HEAD_DIM]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty_v.index(before), count=1)
    for _ in range(own_end, end, BLOCK_N):
        give_back(full_k, empty_k, step, STAGES)
        give_back(full_v, empty_v, step, STAGES)
        step += 1
    store_out(out, lse, acc, running_max, running_sum, start, q_len, stride_om)


@gluon.jit(do_not_specialize=VARYING)
def forward_hopper_kernel(
    out,  # (batch, q_heads, q_len, HEAD_DIM)
    lse,  # (batch, q_heads, q_len) fp32
    q_desc,  # of (batch, q_heads, q_len, HEAD_DIM), blocks of WIDTH rows
    k_desc,  # of (batch, kv_heads, kv_len, HEAD_DIM), blocks of BLOCK_N rows
    v_desc,
    sinks,  # (q_heads,)
    cu_seqlens,  # (documents + 1,) int32
    padding,  # (batch, kv_len) bool
    stride_ob,
    stride_oh,
    stride_om,
    q_heads,
    q_len,
    kv_len,
    window,
    documents,
    search_steps,
    qk_scale,  # scale * log2(e)
    GROUP: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
    PACKED: gl.constexpr,
    PADDED: gl.constexpr,
):
    # Heads vary fastest, so that a kv group's heads share K and V in L2; the last rows, the longest, start first.
    batch = gl.program_id(0) // q_heads
    head = gl.program_id(0) % q_heads
    start_m = (gl.num_programs(1) - 1 - gl.program_id(1)) * TILE
    offset = kv_len - q_len
    bounds = (cu_seqlens, window, documents, search_steps)
    begin = first_key(start_m + offset, bounds, HAS_WINDOW, PACKED) // BLOCK_N * BLOCK_N
    end = gl.minimum(start_m + TILE, q_len) + offset

    q_smem = gl.allocate_shared_memory(q_desc.dtype, [GROUPS, 1, 1, WIDTH, HEAD_DIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], v_desc.layout)
    smem = (q_smem, k_smem, v_smem)
    full = (barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, 1))
    empty = (barriers(STAGES, GROUPS), barriers(STAGES, GROUPS))

    out += batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
    lse += (batch * q_heads + head).to(gl.int64) * q_len
    if PADDED:
        padding += batch.to(gl.int64) * kv_len
    span = (batch, head, head // GROUP, start_m, begin, end)
    pointers = (out, lse, sinks, padding)
    numbers = (stride_om, q_len, kv_len, qk_scale)
    gl.warp_specialize(
        [
            (forward_multiply, (
                smem, full, empty, span, bounds, pointers, numbers, 0, BLOCK_N, STAGES, HAS_SINKS, HAS_WINDOW, PACKED,
                PADDED)),
            (forward_multiply, (
                smem, full, empty, span, bounds, pointers, numbers, 1, BLOCK_N, STAGES, HAS_SINKS, HAS_WINDOW, PACKED,
                PADDED)),
            (forward_multiply, (
                smem, full, empty, span, bounds, pointers, numbers, 2, BLOCK_N, STAGES, HAS_SINKS, HAS_WINDOW, PACKED,
                PADDED)),
            (forward_load, ((q_desc, k_desc, v_desc), smem, full, empty, span, BLOCK_N, STAGES)),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------- delta and dQ


@gluon.jit
def dq_load(descriptors, smem, full, empty, span, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    q_desc, do_desc, o_desc, k_desc, v_desc = descriptors
    q_smem, do_smem, o_smem, k_smem, v_smem = smem
    full_q, full_k = full
    batch, head, kv_head, start_m, begin, end = span
    mbarrier.expect(full_q.index(0), 3 * TILE * HEAD_DIM * 2)
    for part in gl.static_range(GROUPS):
        rows = start_m + part * WIDTH
        async_load(o_desc, [batch, head, rows, 0], full_q.index(0), o_smem.index(part))
        async_load(do_desc, [batch, head, rows, 0], full_q.index(0), do_smem.index(part))
        async_load(q_desc, [batch, head, rows, 0], full_q.index(0), q_smem.index(part))
    step = 0
    for start_n in range(begin, end, BLOCK_N):
        stage = step % STAGES
        bar = full_k.index(stage)
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, 2 * BLOCK_N * HEAD_DIM * 2)
        async_load(k_desc, [batch, kv_head, start_n, 0], bar, k_smem.index(stage))
        async_load(v_desc, [batch, kv_head, start_n, 0], bar, v_smem.index(stage))
        step += 1


@gluon.jit
def load_lse(lse, dlse, start, q_len, stride_lm, layout: gl.constexpr, HAS_DLSE: gl.constexpr):
    """lse of WIDTH rows, inf past q_len, and its gradient."""
    row = start + gl.arange(0, WIDTH, layout=layout)
    row_lse = gl.load(lse + row, mask=row < q_len, other=float("inf"))
    given = gl.zeros([WIDTH], gl.float32, layout=layout)
    if HAS_DLSE:
        given = gl.load(dlse + row.to(gl.int64) * stride_lm, mask=row < q_len, other=0.0).to(gl.float32)
    return row_lse, given


@gluon.jit
def delta_and_lse2(o_tile, do_tile, row_lse, given, delta, lse2, start, rows, layout: gl.constexpr):
    """delta = rowsum(dO * O) - dlse and lse in base 2 (0 for a row that sees nothing), stored for dK and dV."""
    o = o_tile.load(product(HEAD_DIM)).to(gl.float32)
    row_delta = gl.sum(o * do_tile.load(product(HEAD_DIM)).to(gl.float32), 1)
    row_delta = gl.convert_layout(row_delta, layout) - given
    row_lse2 = gl.where(row_lse == float("-inf"), 0.0, row_lse * LOG2E)
    row = start + gl.arange(0, WIDTH, layout=layout)
    gl.store(delta + row, row_delta, mask=row < rows)
    gl.store(lse2 + row, row_lse2, mask=row < rows)
    return row_delta, row_lse2


@gluon.jit
def store_dsink(partial, sinks, head, row_lse, row_delta, start, rows):
    # lse = -inf only where z is -inf too: a sink that is switched off has no gradient.
    z = gl.load(sinks + head).to(gl.float32)
    p_sink = gl.where(row_lse == float("-inf"), 0.0, gl.exp2((z - row_lse) * LOG2E))
    if start < rows:
        gl.store(partial + start // WIDTH, -gl.sum(p_sink * row_delta, 0))


@gluon.jit
def store_rows(pointer, acc, start, length, stride):
    layout: gl.constexpr = acc.type.layout
    row = start + gl.arange(0, WIDTH, layout=gl.SliceLayout(1, layout))
    d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, layout))
    target = pointer + row.to(gl.int64)[:, None] * stride + d[None, :]
    gl.store(target, acc.to(pointer.dtype.element_ty), mask=(row < length)[:, None])


@gluon.jit
def dq_multiply(
    smem, full, empty, span, bounds, pointers, numbers,
    PART: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HAS_SINKS: gl.constexpr, HAS_DLSE: gl.constexpr,
    HAS_WINDOW: gl.constexpr, PACKED: gl.constexpr, PADDED: gl.constexpr,
):  # fmt: skip
    q_smem, do_smem, o_smem, k_smem, v_smem = smem
    full_q, full_k = full
    batch, head, kv_head, start_m, begin, end = span
    dq, lse, dlse, sinks, delta, lse2, partial, padding = pointers
    stride_gm, stride_lm, rows, q_len, kv_len, scale = numbers
    scores_layout: gl.constexpr = product(BLOCK_N)
    dq_layout: gl.constexpr = product(HEAD_DIM)
    rows_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)

    offset = kv_len - q_len
    start = start_m + PART * WIDTH
    limits = row_limits(start, q_len, offset, bounds, rows_layout, HAS_WINDOW, PACKED)
    lowest, newest, position, first = limits
    own = first_key(lowest, bounds, HAS_WINDOW, PACKED) // BLOCK_N * BLOCK_N
    own_end = gl.cdiv(gl.minimum(start + WIDTH, q_len) + offset, BLOCK_N) * BLOCK_N
    column = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, scores_layout))
    zero = gl.zeros([WIDTH, BLOCK_N], gl.float32, layout=scores_layout)
    acc = gl.zeros([WIDTH, HEAD_DIM], gl.float32, layout=dq_layout)

    row_lse, given = load_lse(lse, dlse, start, q_len, stride_lm, rows_layout, HAS_DLSE)
    mbarrier.wait(full_q.index(0), 0)
    q_tile = q_smem.index(PART).reshape([WIDTH, HEAD_DIM])
    do_tile = do_smem.index(PART).reshape([WIDTH, HEAD_DIM])
    o_tile = o_smem.index(PART).reshape([WIDTH, HEAD_DIM])
    row_delta, row_lse2 = delta_and_lse2(o_tile, do_tile, row_lse, given, delta, lse2, start, rows, rows_layout)
    if HAS_SINKS:
        store_dsink(partial, sinks, head, row_lse, row_delta, start, rows)
    step = 0
    for _ in range(begin, own, BLOCK_N):
        give_back(full_k, empty, step, STAGES)
        step += 1
    for start_n in range(own, own_end, BLOCK_N):
        stage = step % STAGES
        mbarrier.wait(full_k.index(stage), (step // STAGES) & 1)
        k_tile = k_smem.index(stage).reshape([BLOCK_N, HEAD_DIM])
        v_tile = v_smem.index(stage).reshape([BLOCK_N, HEAD_DIM])
        scores = warpgroup_mma(q_tile, k_tile.permute([1, 0]), zero, use_acc=False, is_async=True)
        dp = warpgroup_mma(do_tile, v_tile.permute([1, 0]), zero, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        p = gl.exp2(scores * (scale * LOG2E) - row_lse2[:, None])
        p = mask(p, start_n, column, limits, padding, kv_len, 0.0, HAS_WINDOW or PACKED, PADDED)
        dp = warpgroup_mma_wait(0, deps=[dp])
        ds = p * (dp - row_delta[:, None])
        ds = gl.convert_layout(ds.to(q_smem.dtype), gl.DotOperandLayout(0, dq_layout, 2))
        acc = warpgroup_mma(ds, k_tile, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(stage), count=1)
        step += 1
    for _ in range(gl.maximum(own, own_end), end, BLOCK_N):
        give_back(full_k, empty, step, STAGES)
        step += 1
    store_rows(dq, acc * scale, start, q_len, stride_gm)


@gluon.jit(do_not_specialize=VARYING)
def dq_hopper_kernel(
    dq,  # (batch, q_heads, q_len, HEAD_DIM)
    lse,  # (batch, q_heads, q_len) fp32
    dlse,  # the same, any strides; read if HAS_DLSE
    scratch,  # fp32, written for dK and dV: see backward.py
    q_desc,  # of (batch, q_heads, q_len, HEAD_DIM), blocks of WIDTH rows
    do_desc,
    o_desc,
    k_desc,  # of (batch, kv_heads, kv_len, HEAD_DIM), blocks of BLOCK_N rows
    v_desc,
    sinks,  # (q_heads,)
    cu_seqlens,  # (documents + 1,) int32
    padding,  # (batch, kv_len) bool
    stride_gb,
    stride_gh,
    stride_gm,
    stride_lb,
    stride_lh,
    stride_lm,
    q_heads,
    rows,  # q_len rounded up to whole tiles
    q_len,
    kv_len,
    window,
    documents,
    search_steps,
    scale,
    GROUP: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    HAS_DLSE: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
    PACKED: gl.constexpr,
    PADDED: gl.constexpr,
):
    # The order of programs is the forward's.
    gdc_launch_dependents()
    batch = gl.program_id(0) // q_heads
    head = gl.program_id(0) % q_heads
    start_m = (gl.num_programs(1) - 1 - gl.program_id(1)) * TILE
    offset = kv_len - q_len
    bounds = (cu_seqlens, window, documents, search_steps)
    begin = first_key(gl.minimum(start_m, q_len - 1) + offset, bounds, HAS_WINDOW, PACKED) // BLOCK_N * BLOCK_N
    end = gl.minimum(start_m + TILE, q_len) + offset

    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, WIDTH, HEAD_DIM], q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, WIDTH, HEAD_DIM], q_desc.layout)
    o_smem = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, WIDTH, HEAD_DIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], k_desc.layout)
    smem = (q_smem, do_smem, o_smem, k_smem, v_smem)
    full, empty = (barriers(1, 1), barriers(STAGES, 1)), barriers(STAGES, GROUPS)

    line = (batch * q_heads + head).to(gl.int64)
    size = gl.num_programs(0).to(gl.int64) * rows
    lse2, delta, partial = scratch, scratch + size, scratch + 2 * size
    dq += batch.to(gl.int64) * stride_gb + head.to(gl.int64) * stride_gh
    if HAS_DLSE:
        dlse += batch.to(gl.int64) * stride_lb + head.to(gl.int64) * stride_lh
    if PADDED:
        padding += batch.to(gl.int64) * kv_len
    span = (batch, head, head // GROUP, start_m, begin, end)
    pointers = (
        dq, lse + line * q_len, dlse, sinks, delta + line * rows, lse2 + line * rows,
        partial + line * (rows // WIDTH), padding,
    )  # fmt: skip
    numbers = (stride_gm, stride_lm, rows, q_len, kv_len, scale)
    gl.warp_specialize(
        [
            (dq_multiply, (
                smem, full, empty, span, bounds, pointers, numbers, 0, BLOCK_N, STAGES, HAS_SINKS, HAS_DLSE,
                HAS_WINDOW, PACKED, PADDED)),
            (dq_multiply, (
                smem, full, empty, span, bounds, pointers, numbers, 1, BLOCK_N, STAGES, HAS_SINKS, HAS_DLSE,
                HAS_WINDOW, PACKED, PADDED)),
            (dq_multiply, (
                smem, full, empty, span, bounds, pointers, numbers, 2, BLOCK_N, STAGES, HAS_SINKS, HAS_DLSE,
                HAS_WINDOW, PACKED, PADDED)),
            (dq_load, ((q_desc, do_desc, o_desc, k_desc, v_desc), smem, full, empty, span, BLOCK_N, STAGES)),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------- dK and dV


@gluon.jit
def dkdv_load(
    descriptors, smem, full, empty, span, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    q_desc, do_desc, rows_desc = descriptors
    q_smem, do_smem, lse2_smem, delta_smem = smem
    batch, head, line, lines, begin, end = span
    gdc_wait()  # for dQ's lse2 and delta
    step = 0
    for member in range(GROUP):
        for start_m in range(begin, end, BLOCK_M):
            stage = step % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, 2 * BLOCK_M * HEAD_DIM * 2 + 2 * BLOCK_M * 4)
            async_load(q_desc, [batch, head + member, start_m, 0], bar, q_smem.index(stage))
            async_load(rows_desc, [line + member, start_m], bar, lse2_smem.index(stage))
            async_load(do_desc, [batch, head + member, start_m, 0], bar, do_smem.index(stage))
            async_load(rows_desc, [lines + line + member, start_m], bar, delta_smem.index(stage))
            step += 1


@gluon.jit
def dkdv_multiply(
    kv_smem, ready, smem, full, empty, span, bounds, pointers, numbers,
    PART: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    HAS_WINDOW: gl.constexpr, PACKED: gl.constexpr, PADDED: gl.constexpr,
):  # fmt: skip
    k_smem, v_smem = kv_smem
    q_smem, do_smem, lse2_smem, delta_smem = smem
    start_n, begin, end = span
    dk, dv, padding = pointers
    stride_gn, q_len, kv_len, scale = numbers
    scores_layout: gl.constexpr = product(BLOCK_M)
    acc_layout: gl.constexpr = product(HEAD_DIM)
    columns_layout: gl.constexpr = gl.SliceLayout(0, scores_layout)
    scores_operand: gl.constexpr = gl.DotOperandLayout(0, scores_layout, 2)
    acc_operand: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    dtype: gl.constexpr = q_smem.dtype

    offset = kv_len - q_len
    start = start_n + PART * WIDTH
    key = start + gl.arange(0, WIDTH, layout=gl.SliceLayout(1, scores_layout))  # [WIDTH]
    column = gl.arange(0, BLOCK_M, layout=columns_layout)  # [BLOCK_M]
    last = query_end(gl.minimum(key, kv_len - 1), q_len, offset, bounds, HAS_WINDOW, PACKED)  # [WIDTH]
    full_begin = start + WIDTH - 1 - offset
    full_end = query_end(gl.minimum(start, kv_len - 1), q_len, offset, bounds, HAS_WINDOW, PACKED)
    own = gl.maximum(start - offset, 0) // BLOCK_M * BLOCK_M
    own_end = query_end(gl.minimum(start + WIDTH, kv_len) - 1, q_len, offset, bounds, HAS_WINDOW, PACKED)
    own_end = gl.minimum(gl.maximum(gl.cdiv(own_end, BLOCK_M) * BLOCK_M, own), gl.cdiv(end, BLOCK_M) * BLOCK_M)
    own = gl.minimum(own, own_end)
    if PADDED:
        real = gl.load(padding + key, mask=key < kv_len, other=0) != 0

    mbarrier.wait(ready.index(0), 0)
    # Operands in registers: shared memory could not deliver all of them.
    k_tile = k_smem.index(PART).reshape([WIDTH, HEAD_DIM]).load(scores_operand)
    v_tile = v_smem.index(PART).reshape([WIDTH, HEAD_DIM]).load(scores_operand)
    zero = gl.zeros([WIDTH, BLOCK_M], gl.float32, layout=scores_layout)
    acc_dk = gl.zeros([WIDTH, HEAD_DIM], gl.float32, layout=acc_layout)
    acc_dv = gl.zeros([WIDTH, HEAD_DIM], gl.float32, layout=acc_layout)
    step = 0
    for _ in range(GROUP):
        for _ in range(begin, own, BLOCK_M):
            give_back(full, empty, step, STAGES)
            step += 1
        for start_m in range(own, own_end, BLOCK_M):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            q_tile = q_smem.index(stage).reshape([BLOCK_M, HEAD_DIM])
            do_tile = do_smem.index(stage).reshape([BLOCK_M, HEAD_DIM])
            scores = warpgroup_mma(k_tile, q_tile.permute([1, 0]), zero, use_acc=False, is_async=True)
            dp = warpgroup_mma(v_tile, do_tile.permute([1, 0]), zero, use_acc=False, is_async=True)
            row_lse = lse2_smem.index(stage).reshape([BLOCK_M]).load(columns_layout)
            scores = warpgroup_mma_wait(1, deps=[scores])
            p = gl.exp2(scores * (scale * LOG2E) - row_lse[None, :])  # [WIDTH, BLOCK_M]
            row = start_m + column
            if start_m < full_begin:
                p = gl.where(row[None, :] + offset >= key[:, None], p, 0.0)
            if HAS_WINDOW or PACKED:
                if start_m + BLOCK_M > full_end:
                    p = gl.where(row[None, :] < last[:, None], p, 0.0)
            if PADDED:
                p = gl.where(real[:, None], p, 0.0)
            row_delta = delta_smem.index(stage).reshape([BLOCK_M]).load(columns_layout)
            p_operand = gl.convert_layout(p.to(dtype), acc_operand)
            # K and V too look as if they came from here: ptxas 12.8 and 12.9 let others overwrite the registers of
            # operands that never change.
            dp, k_tile, v_tile = warpgroup_mma_wait(0, deps=[dp, k_tile, v_tile])
            acc_dv = warpgroup_mma(p_operand, do_tile, acc_dv, is_async=True)
            ds = p * (dp - row_delta[None, :])
            ds = gl.convert_layout(ds.to(dtype), acc_operand)
            acc_dk = warpgroup_mma(ds, q_tile, acc_dk, is_async=True)
            acc_dv, acc_dk = warpgroup_mma_wait(0, deps=[acc_dv, acc_dk])
            mbarrier.arrive(empty.index(stage), count=1)
            step += 1
        for _ in range(own_end, end, BLOCK_M):
            give_back(full, empty, step, STAGES)
            step += 1

    store_rows(dk, acc_dk * scale, start, kv_len, stride_gn)
    store_rows(dv, acc_dv, start, kv_len, stride_gn)


@gluon.jit
def sum_dsinks(partial, dsinks, kv_head, q_heads, batches, blocks, GROUP: gl.constexpr):
    """As in backward.py, in Gluon: a head a warp, so that no sum needs shared memory. Triton hands the same bytes over
    to the warps of gl.warp_specialize, and puts no barrier between."""
    WARPS: gl.constexpr = 4
    BLOCK: gl.constexpr = 256
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
    member = gl.arange(0, WARPS, layout=gl.SliceLayout(1, layout))
    offs = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
    for first in range(gl.program_id(1) * WARPS, GROUP, gl.num_programs(1) * WARPS):
        head = kv_head * GROUP + first + member  # [WARPS]
        mine = first + member < GROUP
        total = gl.zeros([WARPS, BLOCK], gl.float32, layout=layout)
        for batch in range(batches):
            shares = partial + (batch * q_heads + head).to(gl.int64) * blocks
            for start in range(0, blocks, BLOCK):
                block = start + offs
                seen = mine[:, None] & (block < blocks)[None, :]
                total += gl.load(shares[:, None] + block[None, :], mask=seen, other=0.0)
        gl.store(dsinks + head, gl.sum(total, 1).to(dsinks.dtype.element_ty), mask=mine)


@gluon.jit(do_not_specialize=VARYING)
def dkdv_hopper_kernel(
    dk,  # (batch, kv_heads, kv_len, HEAD_DIM)
    dv,
    k_desc,  # of (batch, kv_heads, kv_len, HEAD_DIM), blocks of WIDTH rows
    v_desc,
    q_desc,  # of (batch, q_heads, q_len, HEAD_DIM), blocks of BLOCK_M rows
    do_desc,
    rows_desc,  # of (2 * batch * q_heads, rows) fp32, blocks of BLOCK_M: lse2 and delta, which dQ has left in scratch
    scratch,
    dsinks,  # (q_heads,), written
    cu_seqlens,  # (documents + 1,) int32
    padding,  # (batch, kv_len) bool
    stride_gb,
    stride_gh,
    stride_gn,
    kv_heads,
    batches,
    blocks,
    rows,
    q_len,
    kv_len,
    window,
    documents,
    search_steps,
    scale,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
    PACKED: gl.constexpr,
    PADDED: gl.constexpr,
):
    # One program a (key tile, kv head): it loops over the group's query heads. The first keys, seen most, start first.
    PARTS: gl.constexpr = 2
    batch = gl.program_id(0) // kv_heads
    kv_head = gl.program_id(0) % kv_heads
    start_n = gl.program_id(1) * (PARTS * WIDTH)
    offset = kv_len - q_len
    bounds = (cu_seqlens, window, documents, search_steps)
    begin = gl.maximum(start_n - offset, 0) // BLOCK_M * BLOCK_M
    newest = gl.minimum(start_n + PARTS * WIDTH, kv_len) - 1
    end = query_end(newest, q_len, offset, bounds, HAS_WINDOW, PACKED)

    dtype: gl.constexpr = q_desc.dtype
    k_smem = gl.allocate_shared_memory(dtype, [PARTS, 1, 1, WIDTH, HEAD_DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [PARTS, 1, 1, WIDTH, HEAD_DIM], k_desc.layout)
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, HEAD_DIM], q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, HEAD_DIM], q_desc.layout)
    lse2_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], rows_desc.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], rows_desc.layout)
    ready, full, empty = barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, PARTS)
    mbarrier.expect(ready.index(0), 2 * PARTS * WIDTH * HEAD_DIM * 2)
    for part in gl.static_range(PARTS):
        async_load(k_desc, [batch, kv_head, start_n + part * WIDTH, 0], ready.index(0), k_smem.index(part))
        async_load(v_desc, [batch, kv_head, start_n + part * WIDTH, 0], ready.index(0), v_smem.index(part))
    lines = gl.num_programs(0) * GROUP
    if HAS_SINKS:
        if batch == 0:
            gdc_wait()
            partial = scratch + 2 * lines.to(gl.int64) * rows
            sum_dsinks(partial, dsinks, kv_head, kv_heads * GROUP, batches, blocks, GROUP)

    shift = batch.to(gl.int64) * stride_gb + kv_head.to(gl.int64) * stride_gh
    if PADDED:
        padding += batch.to(gl.int64) * kv_len
    kv_smem, smem = (k_smem, v_smem), (q_smem, do_smem, lse2_smem, delta_smem)
    span = (start_n, begin, end)
    pointers, numbers = (dk + shift, dv + shift, padding), (stride_gn, q_len, kv_len, scale)
    head = kv_head * GROUP
    load_span = (batch, head, batch * kv_heads * GROUP + head, lines, begin, end)
    gl.warp_specialize(
        [
            (dkdv_multiply, (
                kv_smem, ready, smem, full, empty, span, bounds, pointers, numbers, 0, GROUP, BLOCK_M, STAGES,
                HAS_WINDOW, PACKED, PADDED)),
            (dkdv_multiply, (
                kv_smem, ready, smem, full, empty, span, bounds, pointers, numbers, 1, GROUP, BLOCK_M, STAGES,
                HAS_WINDOW, PACKED, PADDED)),
            (dkdv_load, (
                (q_desc, do_desc, rows_desc), smem, full, empty, load_span, GROUP, BLOCK_M, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
