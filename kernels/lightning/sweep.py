"""The device code of `kernels.lightning.fused`, whose docstring says what is computed and why.

Every decay is `exp2` of a number <= 0: rows beyond the end of a document are clamped, not masked
after the fact. Offsets into tensors are int64.

Shapes: C tokens in a chunk, D key width, E value channels of a program.
"""

import triton
import triton.language as tl

_LENGTHS = ["tokens", "documents", "pieces_per_row"]
"""They change from batch to batch: a kernel is not to be compiled anew for a 1 or a multiple of 16
among them."""


@triton.jit
def _document_of(piece_id, cu_seqlens, documents, pieces_per_row, piece):
    """The document of a piece."""
    if cu_seqlens is None:
        document = piece_id // pieces_per_row
    else:
        document = piece_id * 0
        beyond = document + documents
        while beyond - document > 1:
            middle = (document + beyond) // 2
            is_reached = tl.load(cu_seqlens + middle) // piece + middle <= piece_id
            document = tl.where(is_reached, middle, document)
            beyond = tl.where(is_reached, beyond, middle)
    return document


@triton.jit
def _piece_bounds(piece_id, document, cu_seqlens, tokens, pieces_per_row, piece):
    """The tokens [begin, end) of a piece in its row, `begin >= end` where it is empty."""
    if cu_seqlens is None:
        begin = (piece_id - document * pieces_per_row) * piece
        end = tl.minimum(begin + piece, tokens)
    else:
        grid_begin = (piece_id - document) * piece
        begin = tl.maximum(tl.load(cu_seqlens + document), grid_begin)
        end = tl.minimum(tl.load(cu_seqlens + document + 1), grid_begin + piece)
    return begin, end


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def _load(pointers, mask, SILU: tl.constexpr, COMPUTE: tl.constexpr):
    x = tl.load(pointers, mask=mask, other=0.0)
    if SILU:
        x = x.to(tl.float32)
        x = x * _sigmoid(x)
    return x.to(COMPUTE)


@triton.jit(do_not_specialize=_LENGTHS)
def sweep(
    queries,
    keys,
    values,
    out,
    before_silu,
    state,
    leaving,
    decay,
    cu_seqlens,
    tokens,
    documents,
    pieces_per_row,
    piece,
    heads,
    queries_b,
    queries_t,
    queries_h,
    queries_d,
    keys_b,
    keys_t,
    keys_h,
    keys_d,
    values_b,
    values_t,
    values_h,
    values_d,
    out_b,
    out_t,
    out_h,
    out_d,
    before_b,
    before_t,
    before_h,
    before_d,
    state_k,
    state_v,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
    SILU_QUERIES: tl.constexpr,
    SILU_KEYS: tl.constexpr,
    SILU_VALUES: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One piece of one head, a tile of its value channels.

    Queries, keys and values of a position see each other backwards from the end where REVERSE. The
    state entering a chunk forwards is that before its first token, and has decayed i + 1 times at
    token i; backwards it is the gradient of the state after its last token, and has decayed as
    often as tokens follow. A key's way to the state that leaves the chunk is the other of the two.
    """
    tiles: tl.constexpr = (VALUE_WIDTH + VALUE_TILE - 1) // VALUE_TILE
    program = tl.program_id(0)
    tile = program % tiles
    head = (program // tiles % heads).to(tl.int64)
    piece_id = program // tiles // heads
    document = _document_of(piece_id, cu_seqlens, documents, pieces_per_row, piece)
    begin, end = _piece_bounds(piece_id, document, cu_seqlens, tokens, pieces_per_row, piece)
    row = (document if cu_seqlens is None else 0) + tl.zeros((), tl.int64)

    i = tl.arange(0, CHUNK)
    d = tl.arange(0, WIDTH_TILE).to(tl.int64)
    e = (tile * VALUE_TILE + tl.arange(0, VALUE_TILE)).to(tl.int64)
    is_d = d < WIDTH
    is_e = e < VALUE_WIDTH
    slope = tl.load(decay + head) * 1.4426950408889634
    ahead = i[None, :] - i[:, None] if REVERSE else i[:, None] - i[None, :]
    weights = tl.where(ahead >= 0, tl.exp2(-slope * tl.maximum(ahead, 0)), 0.0)
    from_start = tl.exp2(-slope * (i + 1))

    state_at = (piece_id.to(tl.int64) * heads + head) * WIDTH * VALUE_WIDTH
    state_at += d[:, None] * state_k + e[None, :] * state_v
    is_state = is_d[:, None] & is_e[None, :]
    if state is None:
        s = tl.zeros((WIDTH_TILE, VALUE_TILE), tl.float32)
    else:
        s = tl.load(state + state_at, mask=is_state, other=0.0)

    keys += row * keys_b + head * keys_h
    values += row * values_b + head * values_h
    if out is not None:
        queries += row * queries_b + head * queries_h
        out += row * out_b + head * out_h
    if before_silu is not None:
        before_silu += row * before_b + head * before_h

    chunks = tl.maximum(end - begin + CHUNK - 1, 0) // CHUNK
    for m in range(chunks):
        start = begin + (chunks - 1 - m if REVERSE else m) * CHUNK
        length = tl.minimum(end - start, CHUNK)
        t = start + i.to(tl.int64)
        to_end = tl.exp2(-slope * tl.maximum(length - 1 - i, 0))
        is_i = i < length
        is_k, is_v = is_d[:, None] & is_i[None, :], is_i[:, None] & is_e[None, :]
        k_at = keys + t[None, :] * keys_t + d[:, None] * keys_d
        k_DC = _load(k_at, is_k, SILU_KEYS, COMPUTE)
        v_at = values + t[:, None] * values_t + e[None, :] * values_d
        v_CE = _load(v_at, is_v, SILU_VALUES, COMPUTE)
        if out is not None:
            is_q = is_i[:, None] & is_d[None, :]
            q_at = queries + t[:, None] * queries_t + d[None, :] * queries_d
            q_CD = _load(q_at, is_q, SILU_QUERIES, COMPUTE)
            o_CE = tl.dot(q_CD, s.to(COMPUTE), input_precision=PRECISION)
            o_CE *= (to_end if REVERSE else from_start)[:, None]
            scores_CC = tl.dot(q_CD, k_DC, input_precision=PRECISION) * weights
            o_CE = tl.dot(scores_CC.to(COMPUTE), v_CE, o_CE, input_precision=PRECISION)
            if before_silu is not None:
                x_at = before_silu + t[:, None] * before_t + e[None, :] * before_d
                x = tl.load(x_at, mask=is_v, other=0.0).to(tl.float32)
                gate = _sigmoid(x)
                o_CE *= gate * (1 + x * (1 - gate))
            out_at = out + t[:, None] * out_t + e[None, :] * out_d
            tl.store(out_at, o_CE.to(out.dtype.element_ty), mask=is_v)
        weighted_DC = (k_DC * (from_start if REVERSE else to_end)[None, :]).to(COMPUTE)
        s = tl.dot(weighted_DC, v_CE, s * tl.exp2(-slope * length), input_precision=PRECISION)

    if leaving is not None:
        tl.store(leaving + state_at, s, mask=is_state)


@triton.jit(do_not_specialize=_LENGTHS)
def scan(
    states,
    boundary,
    leaving,
    decay,
    cu_seqlens,
    tokens,
    documents,
    pieces_per_row,
    piece,
    heads,
    numbers,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """In place, from what each piece of a document adds to the state, to the state that enters it,
    starting from `boundary`; what is left at the other end goes to `leaving`."""
    tiles = (numbers + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    e = program % tiles * BLOCK + tl.arange(0, BLOCK)
    head = (program // tiles % heads).to(tl.int64)
    document = program // tiles // heads
    is_e = e < numbers
    slope = tl.load(decay + head) * 1.4426950408889634
    outer_at = (document.to(tl.int64) * heads + head) * numbers + e
    if boundary is None:
        s = tl.zeros((BLOCK,), tl.float32)
    else:
        s = tl.load(boundary + outer_at, mask=is_e, other=0.0)
    if cu_seqlens is None:
        first = document * pieces_per_row
        count = pieces_per_row
    else:
        start = tl.load(cu_seqlens + document)
        last = tl.maximum(tl.load(cu_seqlens + document + 1) - 1, start)
        first = start // piece + document
        count = last // piece - start // piece + 1
    for m in range(count):
        piece_id = first + (count - 1 - m if REVERSE else m)
        begin, end = _piece_bounds(piece_id, document, cu_seqlens, tokens, pieces_per_row, piece)
        at = states + (piece_id.to(tl.int64) * heads + head) * numbers + e
        added = tl.load(at, mask=is_e, other=0.0)
        tl.store(at, s, mask=is_e)
        s = s * tl.exp2(-slope * tl.maximum(end - begin, 0)) + added
    if leaving is not None:
        tl.store(leaving + outer_at, s, mask=is_e)


@triton.jit
def decode(
    queries,
    keys,
    values,
    out,
    decay,
    states,
    slots,
    heads,
    queries_s,
    queries_h,
    queries_d,
    keys_s,
    keys_h,
    keys_d,
    values_s,
    values_h,
    values_d,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    SILU: tl.constexpr,
):
    """One step of one head of one sequence, a tile of its value channels."""
    tiles: tl.constexpr = (VALUE_WIDTH + VALUE_TILE - 1) // VALUE_TILE
    program = tl.program_id(0)
    head = (program // tiles % heads).to(tl.int64)
    sequence = (program // tiles // heads).to(tl.int64)
    slot = tl.load(slots + sequence).to(tl.int64)
    d = tl.arange(0, WIDTH_TILE).to(tl.int64)
    e = (program % tiles * VALUE_TILE + tl.arange(0, VALUE_TILE)).to(tl.int64)
    is_d, is_e = d < WIDTH, e < VALUE_WIDTH
    o = tl.zeros((VALUE_TILE,), tl.float32)
    if slot >= 0:
        q_at = queries + sequence * queries_s + head * queries_h + d * queries_d
        k_at = keys + sequence * keys_s + head * keys_h + d * keys_d
        v_at = values + sequence * values_s + head * values_h + e * values_d
        q = _load(q_at, is_d, SILU, tl.float32)
        k = _load(k_at, is_d, SILU, tl.float32)
        v = _load(v_at, is_e, SILU, tl.float32)
        state_at = states + (slot * heads + head) * WIDTH * VALUE_WIDTH
        state_at += d[:, None] * VALUE_WIDTH + e[None, :]
        is_state = is_d[:, None] & is_e[None, :]
        s = tl.load(state_at, mask=is_state, other=0.0)
        s = s * tl.exp2(tl.load(decay + head) * -1.4426950408889634) + k[:, None] * v[None, :]
        tl.store(state_at, s, mask=is_state)
        o = tl.sum(q[:, None] * s, axis=0)
    out_at = out + (sequence * heads + head) * VALUE_WIDTH + e
    tl.store(out_at, o.to(out.dtype.element_ty), mask=is_e)
