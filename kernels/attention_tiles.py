# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
"""The four passes of interval attention, on tiles: forward, delta, dk and dv, dq. See `attention.py` for the whole.

Row i sees the keys [low_i, high_i] and nothing else; both bounds never decrease from one row to the next. So the keys
that a tile of rows needs are one interval too, from the first row's low to the last row's high; tiles outside of it
are not visited, and a tile needs a mask only if it reaches below the last row's low or above the first row's high.
The rows that see column j are an interval by the same argument, which is how dk and dv walk.

Legend: B batch, T queries, S keys, N query heads, G key and value heads, K head width; M rows and C columns of a tile.
The mask stays a branch inside one loop: separate loops for whole and cut tiles make ptxas serialise the tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megagpt.kernels.philox import kept

CHANGING = ["key", "first_head", "behind", "ahead"]  # from layer to layer: their values must not recompile a kernel
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _bounds(low, high, batch, at, limit, size, behind, ahead):
    """What positions `at` (below `limit`) see of `size` others: (first, last), included; nothing if first > last."""
    first = tl.maximum(at - behind, 0)
    last = tl.minimum(at + ahead, size - 1)
    if low is not None:
        first = tl.maximum(first, tl.load(low + batch * limit + at, mask=at < limit, other=0))
    if high is not None:
        last = tl.minimum(last, tl.load(high + batch * limit + at, mask=at < limit, other=0))
    return first, last


@triton.jit
def _load(pointers, rows, limit, d, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of the rows below `limit`; zeros elsewhere."""
    if K == BLOCK_K:
        values = tl.load(pointers, mask=rows[:, None] < limit, other=0.0)
    else:
        values = tl.load(pointers, mask=(rows[:, None] < limit) & (d[None, :] < K), other=0.0)
    return values


@triton.jit
def _store(pointers, values, rows, limit, d, K: tl.constexpr):
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=(rows[:, None] < limit) & (d[None, :] < K))


@triton.jit
def _scores(dots, scale, CAP: tl.constexpr):
    """Scores in units of log2, and the slope of the cap at them (unused without a cap)."""
    if CAP == 0:
        return dots * (scale * LOG2_E), dots
    else:  # noqa: RET505 - what follows a constexpr branch is compiled; what is inside the other one is not
        bent = 2 * tl.sigmoid(dots * (2 / CAP * scale)) - 1  # tanh
        return bent * (CAP * LOG2_E), 1 - bent * bent


@triton.jit(do_not_specialize=CHANGING)
def forward(
    q, k, v, o, lse, low, high, samples, key, first_head, scale, behind, ahead, T, S, N,
    q_b, q_t, q_n, k_b, k_t, k_n, v_b, v_t, v_n,
    GROUP: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, M: tl.constexpr, C: tl.constexpr, CAP: tl.constexpr,
    RATE: tl.constexpr, THRESHOLD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program, M queries of one head. Saves the log2 of each row's sum; +inf for a row that sees nothing."""
    tiles = tl.cdiv(T, M)
    start = (tiles - 1 - tl.program_id(0) % tiles) * M  # the longest rows of a causal layer first
    pair = tl.program_id(0) // tiles
    batch, head = (pair // N).to(tl.int64), (pair % N).to(tl.int64)
    rows, d, c = start + tl.arange(0, M), tl.arange(0, BLOCK_K), tl.arange(0, C)
    low_M, high_M = _bounds(low, high, batch, rows, T, S, behind, ahead)
    low_first, high_first = _bounds(low, high, batch, start, T, S, behind, ahead)
    low_last, high_last = _bounds(low, high, batch, tl.minimum(start + M, T) - 1, T, S, behind, ahead)

    q_MK = _load(q + batch * q_b + head * q_n + rows.to(tl.int64)[:, None] * q_t + d[None, :], rows, T, d, K, BLOCK_K)
    k_tile = k + batch * k_b + head // GROUP * k_n + c[:, None] * k_t + d[None, :]
    v_tile = v + batch * v_b + head // GROUP * v_n + c[:, None] * v_t + d[None, :]
    k_step, v_step = k_t.to(tl.int64), v_t.to(tl.int64)  # S * stride passes 2**31 at real sizes
    if RATE > 0:
        sample = tl.load(samples + batch)
    top_M = tl.full([M], -float("inf"), ACC)
    sum_M = tl.zeros([M], ACC)
    sum_MK = tl.zeros([M, BLOCK_K], ACC)
    for at in range(low_first // C * C, high_last + 1, C):
        columns = at + c
        k_CK = _load(k_tile + at * k_step, columns, S, d, K, BLOCK_K)
        s_MC, _ = _scores(tl.dot(q_MK, tl.trans(k_CK), input_precision=PRECISION, out_dtype=ACC), scale, CAP)
        if (at < low_last) | (at + C - 1 > high_first):
            s_MC = tl.where(
                (columns[None, :] >= low_M[:, None]) & (columns[None, :] <= high_M[:, None]), s_MC, -float("inf")
            )
        new_M = tl.maximum(top_M, tl.max(s_MC, 1))
        safe_M = tl.where(new_M == -float("inf"), 0.0, new_M)  # a row that has seen nothing yet
        p_MC = tl.exp2(s_MC - safe_M[:, None])
        decay_M = tl.exp2(top_M - safe_M)
        sum_M = sum_M * decay_M + tl.sum(p_MC, 1)
        if RATE > 0:
            keep = kept(key, at // 4 + tl.arange(0, C // 4), rows, sample, first_head + head, THRESHOLD)
            p_MC = tl.where(keep, p_MC, 0.0)
        v_CK = _load(v_tile + at * v_step, columns, S, d, K, BLOCK_K)
        sum_MK = tl.dot(p_MC.to(v_CK.dtype), v_CK, sum_MK * decay_M[:, None], input_precision=PRECISION, out_dtype=ACC)
        top_M = new_M
    safe_M = tl.where(sum_M == 0, 1.0, sum_M)
    lse_M = tl.where(sum_M == 0, float("inf"), top_M + tl.log2(safe_M))
    tl.store(lse + (batch * N + head) * T + rows, lse_M, mask=rows < T)
    o_tile = o + ((batch * T + rows)[:, None] * N + head) * K + d[None, :]
    _store(o_tile, sum_MK / (safe_M * (1 - RATE))[:, None], rows, T, d, K)


@triton.jit
def delta(o, do, out, T, N, K: tl.constexpr, BLOCK_K: tl.constexpr, M: tl.constexpr, ACC: tl.constexpr):
    """One program, M queries of one head: the sum of o * do over features, which every gradient of a row needs."""
    tiles = tl.cdiv(T, M)
    pair = tl.program_id(0) // tiles
    batch, head = (pair // N).to(tl.int64), (pair % N).to(tl.int64)
    rows, d = tl.program_id(0) % tiles * M + tl.arange(0, M), tl.arange(0, BLOCK_K)
    at = ((batch * T + rows)[:, None] * N + head) * K + d[None, :]
    product = _load(o + at, rows, T, d, K, BLOCK_K).to(ACC) * _load(do + at, rows, T, d, K, BLOCK_K).to(ACC)
    tl.store(out + (batch * N + head) * T + rows, tl.sum(product, 1), mask=rows < T)


@triton.jit(do_not_specialize=CHANGING)
def backward_keys(
    q, k, v, do, lse, row_delta, dk, dv, first, last, samples, key, first_head, scale, behind, ahead, T, S, N,
    q_b, q_t, q_n, k_b, k_t, k_n, v_b, v_t, v_n,
    GROUP: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, M: tl.constexpr, C: tl.constexpr, CAP: tl.constexpr,
    RATE: tl.constexpr, THRESHOLD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program, dk and dv of C keys of one key head: it walks over the group's query heads and their rows."""
    tiles = tl.cdiv(S, C)
    start = tl.program_id(0) % tiles * C
    pair = tl.program_id(0) // tiles
    G = N // GROUP
    batch, key_head = (pair // G).to(tl.int64), (pair % G).to(tl.int64)
    columns, d, m = start + tl.arange(0, C), tl.arange(0, BLOCK_K), tl.arange(0, M)
    first_C, last_C = _bounds(first, last, batch, columns, S, T, ahead, behind)
    first_first, last_first = _bounds(first, last, batch, start, S, T, ahead, behind)
    first_last, last_last = _bounds(first, last, batch, tl.minimum(start + C, S) - 1, S, T, ahead, behind)

    k_at = k + batch * k_b + key_head * k_n + columns.to(tl.int64)[:, None] * k_t + d[None, :]
    v_at = v + batch * v_b + key_head * v_n + columns.to(tl.int64)[:, None] * v_t + d[None, :]
    k_CK = _load(k_at, columns, S, d, K, BLOCK_K)
    v_CK = _load(v_at, columns, S, d, K, BLOCK_K)
    q_tile = q + batch * q_b + m[:, None] * q_t + d[None, :]
    do_tile = do + batch * T * N * K + m[:, None] * (N * K) + d[None, :]
    q_step, do_step = q_t.to(tl.int64), (N * K).to(tl.int64)
    if RATE > 0:
        sample = tl.load(samples + batch)
    dk_CK = tl.zeros([C, BLOCK_K], ACC)
    dv_CK = tl.zeros([C, BLOCK_K], ACC)
    row_start = first_first // M * M
    steps = tl.maximum(tl.cdiv(last_last + 1 - row_start, M), 0)
    for step in range(steps * GROUP):  # one flat loop: nested ones spill
        head = key_head * GROUP + step // steps
        at = row_start + step % steps * M
        rows = at + m
        q_MK = _load(q_tile + head * q_n + at * q_step, rows, T, d, K, BLOCK_K)
        lse_M = tl.load(lse + (batch * N + head) * T + rows, mask=rows < T, other=float("inf"))
        s_CM, slope_CM = _scores(tl.dot(k_CK, tl.trans(q_MK), input_precision=PRECISION, out_dtype=ACC), scale, CAP)
        if (at < first_last) | (at + M - 1 > last_first):
            s_CM = tl.where(
                (rows[None, :] >= first_C[:, None]) & (rows[None, :] <= last_C[:, None]), s_CM, -float("inf")
            )
        p_CM = tl.exp2(s_CM - lse_M[None, :])
        if RATE > 0:
            keep_MC = kept(key, start // 4 + tl.arange(0, C // 4), rows, sample, first_head + head, THRESHOLD)
            factor_CM = tl.where(tl.trans(keep_MC), 1 / (1 - RATE), 0.0)
        do_MK = _load(do_tile + head * K + at * do_step, rows, T, d, K, BLOCK_K)
        dp_CM = tl.dot(v_CK, tl.trans(do_MK), input_precision=PRECISION, out_dtype=ACC)
        kept_CM = p_CM
        if RATE > 0:
            kept_CM = p_CM * factor_CM
            dp_CM *= factor_CM
        delta_M = tl.load(row_delta + (batch * N + head) * T + rows, mask=rows < T, other=0.0)
        dv_CK = tl.dot(kept_CM.to(do_MK.dtype), do_MK, dv_CK, input_precision=PRECISION, out_dtype=ACC)
        ds_CM = p_CM * (dp_CM - delta_M[None, :])
        if CAP > 0:
            ds_CM *= slope_CM
        dk_CK = tl.dot(ds_CM.to(q_MK.dtype), q_MK, dk_CK, input_precision=PRECISION, out_dtype=ACC)
    to = ((batch * S + columns)[:, None] * G + key_head) * K + d[None, :]
    _store(dk + to, dk_CK * scale, columns, S, d, K)
    _store(dv + to, dv_CK, columns, S, d, K)


@triton.jit(do_not_specialize=CHANGING)
def backward_queries(
    q, k, v, do, lse, row_delta, dq, low, high, samples, key, first_head, scale, behind, ahead, T, S, N,
    q_b, q_t, q_n, k_b, k_t, k_n, v_b, v_t, v_n,
    GROUP: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, M: tl.constexpr, C: tl.constexpr, CAP: tl.constexpr,
    RATE: tl.constexpr, THRESHOLD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program, dq of M queries of one head: it walks over keys as the forward does."""
    tiles = tl.cdiv(T, M)
    start = (tiles - 1 - tl.program_id(0) % tiles) * M
    pair = tl.program_id(0) // tiles
    batch, head = (pair // N).to(tl.int64), (pair % N).to(tl.int64)
    rows, d, c = start + tl.arange(0, M), tl.arange(0, BLOCK_K), tl.arange(0, C)
    low_M, high_M = _bounds(low, high, batch, rows, T, S, behind, ahead)
    low_first, high_first = _bounds(low, high, batch, start, T, S, behind, ahead)
    low_last, high_last = _bounds(low, high, batch, tl.minimum(start + M, T) - 1, T, S, behind, ahead)

    to = ((batch * T + rows)[:, None] * N + head) * K + d[None, :]
    q_MK = _load(q + batch * q_b + head * q_n + rows.to(tl.int64)[:, None] * q_t + d[None, :], rows, T, d, K, BLOCK_K)
    do_MK = _load(do + to, rows, T, d, K, BLOCK_K)
    lse_M = tl.load(lse + (batch * N + head) * T + rows, mask=rows < T, other=float("inf"))
    delta_M = tl.load(row_delta + (batch * N + head) * T + rows, mask=rows < T, other=0.0)
    k_tile = k + batch * k_b + head // GROUP * k_n + c[:, None] * k_t + d[None, :]
    v_tile = v + batch * v_b + head // GROUP * v_n + c[:, None] * v_t + d[None, :]
    k_step, v_step = k_t.to(tl.int64), v_t.to(tl.int64)
    if RATE > 0:
        sample = tl.load(samples + batch)
    dq_MK = tl.zeros([M, BLOCK_K], ACC)
    for at in range(low_first // C * C, high_last + 1, C):
        columns = at + c
        k_CK = _load(k_tile + at * k_step, columns, S, d, K, BLOCK_K)
        v_CK = _load(v_tile + at * v_step, columns, S, d, K, BLOCK_K)
        s_MC, slope_MC = _scores(tl.dot(q_MK, tl.trans(k_CK), input_precision=PRECISION, out_dtype=ACC), scale, CAP)
        if (at < low_last) | (at + C - 1 > high_first):
            s_MC = tl.where(
                (columns[None, :] >= low_M[:, None]) & (columns[None, :] <= high_M[:, None]), s_MC, -float("inf")
            )
        p_MC = tl.exp2(s_MC - lse_M[:, None])
        if RATE > 0:
            keep_MC = kept(key, at // 4 + tl.arange(0, C // 4), rows, sample, first_head + head, THRESHOLD)
            factor_MC = tl.where(keep_MC, 1 / (1 - RATE), 0.0)
        dp_MC = tl.dot(do_MK, tl.trans(v_CK), input_precision=PRECISION, out_dtype=ACC)
        if RATE > 0:
            dp_MC *= factor_MC
        ds_MC = p_MC * (dp_MC - delta_M[:, None])
        if CAP > 0:
            ds_MC *= slope_MC
        dq_MK = tl.dot(ds_MC.to(k_CK.dtype), k_CK, dq_MK, input_precision=PRECISION, out_dtype=ACC)
    _store(dq + to, dq_MK * scale, rows, T, d, K)
