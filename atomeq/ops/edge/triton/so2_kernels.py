"""What SO(2) maps do on the device; ``so2.py`` starts it.

A program makes a tile (edges, outputs) of +m and of -m together: their inputs and weights are read
once for both. ``ORDERS`` has for each m the kind of its product, the first columns of +m and -m
that are read, how many, where its weights begin, and more that only one kernel reads. Weights are
matrices (outputs, inputs) one after the other, for m > 0 three, W_1, A and B, unless they are real:

    FOUR    y_+ = W_1 x_+ + A x_-,            y_- = W_1 x_- + B x_+
    THREE   y_+ = W_1 (x_+ + x_-) + A x_-,    y_- = W_1 (x_+ + x_-) + B x_+
"""

# Only Triton's compiler goes through tl.static_range; to a type checker it raises.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from atomeq.ops.edge.triton.rotation_kernels import row_of

REAL, THREE, FOUR = 0, 1, 2  # kinds of products; the device has them as numbers


@triton.jit
def place_of_program(n_edge_tiles, N_TILES: tl.constexpr, TOGETHER: tl.constexpr):
    """Return the tile of edges and the tile of outputs of a program.

    Some tiles of edges take turns at each tile of outputs before the next ones begin: what runs at
    a time reads few rows and few weights, and finds them in the cache.
    """
    program = tl.program_id(0)
    first = program // (TOGETHER * N_TILES) * TOGETHER
    turn = program - first * N_TILES
    n_turns = tl.minimum(n_edge_tiles - first, TOGETHER)
    return first + turn % n_turns, turn // n_turns


@triton.jit
def load_tile(pointer, mask, ROUND: tl.constexpr, UPCAST: tl.constexpr):
    """Return operands of a product."""
    value = tl.load(pointer, mask=mask, other=0.0)
    if ROUND:
        value = value.to(tl.bfloat16)
    return value.to(tl.float32) if UPCAST else value  # bf16 products fail in the interpreter


@triton.jit
def product(rows, weight, there, wanted, INNER: tl.constexpr, PRECISION: tl.constexpr,
            ROUND: tl.constexpr, UPCAST: tl.constexpr, SUM: tl.constexpr,
            TILE: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """Return a tile of rows times one matrix."""
    total = tl.zeros((TILE, OUTPUTS), dtype=SUM)
    for start in range(0, INNER, STEP):
        inner = start + tl.arange(0, STEP)
        real = inner < INNER
        values = load_tile(rows + inner[None, :], there & real[None, :], ROUND, UPCAST)
        matrix = load_tile(weight + inner[:, None], real[:, None] & wanted, False, UPCAST)
        total = tl.dot(values, matrix, total, input_precision=PRECISION)
    return total


@triton.jit
def product_and_gate(rows, weight, there, wanted, BACK, has_gate, INNER: tl.constexpr,
                     PRECISION: tl.constexpr, ROUND: tl.constexpr, UPCAST: tl.constexpr,
                     SUM: tl.constexpr, TILE: tl.constexpr, OUTPUTS: tl.constexpr,
                     STEP: tl.constexpr):  # fmt: skip
    """Return a tile of rows times one matrix and times that of its gates, ``BACK`` before it."""
    total = tl.zeros((TILE, OUTPUTS), dtype=SUM)
    gate = tl.zeros((TILE, OUTPUTS), dtype=SUM)
    for start in range(0, INNER, STEP):
        inner = start + tl.arange(0, STEP)
        real = inner < INNER
        used = real[:, None] & wanted
        values = load_tile(rows + inner[None, :], there & real[None, :], ROUND, UPCAST)
        matrix = load_tile(weight + inner[:, None], used, False, UPCAST)
        opening = load_tile(weight - BACK + inner[:, None], used & has_gate, False, UPCAST)
        total = tl.dot(values, matrix, total, input_precision=PRECISION)
        gate = tl.dot(values, opening, gate, input_precision=PRECISION)
    return total, gate


@triton.jit
def pair_of_products(upper_rows, lower_rows, weight, there, wanted, SIZE: tl.constexpr,
                     KIND: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
                     ROUND: tl.constexpr, UPCAST: tl.constexpr, SUM: tl.constexpr,
                     TILE: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """Return tiles of +m and -m; ``SIZE`` is that of one matrix."""
    plus = tl.zeros((TILE, OUTPUTS), dtype=SUM)
    minus = tl.zeros((TILE, OUTPUTS), dtype=SUM)
    shared = tl.zeros((TILE, OUTPUTS), dtype=SUM)
    for start in range(0, INNER, STEP):
        inner = start + tl.arange(0, STEP)
        real = inner < INNER
        kept, used = there & real[None, :], real[:, None] & wanted
        upper = load_tile(upper_rows + inner[None, :], kept, ROUND, UPCAST)
        lower = load_tile(lower_rows + inner[None, :], kept, ROUND, UPCAST)
        matrix = load_tile(weight + inner[:, None], used, False, UPCAST)
        if KIND == 1:  # three products
            shared = tl.dot(upper + lower, matrix, shared, input_precision=PRECISION)
        else:
            plus = tl.dot(upper, matrix, plus, input_precision=PRECISION)
            minus = tl.dot(lower, matrix, minus, input_precision=PRECISION)
        if KIND > 0:
            matrix = load_tile(weight + SIZE + inner[:, None], used, False, UPCAST)
            plus = tl.dot(lower, matrix, plus, input_precision=PRECISION)
            matrix = load_tile(weight + 2 * SIZE + inner[:, None], used, False, UPCAST)
            minus = tl.dot(upper, matrix, minus, input_precision=PRECISION)
    if KIND == 1:
        plus += shared
        minus += shared
    return plus, minus


@triton.jit
def map_rows(rows, weights, bias, out, n_edges, READ_WIDTH: tl.constexpr,
             WRITE_WIDTH: tl.constexpr, N_ORDERS: tl.constexpr, ORDERS: tl.constexpr,
             N_TILES: tl.constexpr, TOGETHER: tl.constexpr, PRECISION: tl.constexpr,
             ROUND: tl.constexpr, UPCAST: tl.constexpr, SUM: tl.constexpr,
             TILE: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """Write M rows + bias. Tiles go through the outputs of m = 0, of m = 1, ..."""
    edge_tile, tile = place_of_program(tl.cdiv(n_edges, TILE), N_TILES, TOGETHER)
    first, edge = (edge_tile * TILE).to(tl.int64), tl.arange(0, TILE)
    there = (edge < n_edges - first)[:, None]
    read = rows + first * READ_WIDTH + (edge * READ_WIDTH)[:, None]
    for m in tl.static_range(N_ORDERS):
        if (tile >= ORDERS[m][8]) & (tile < ORDERS[m][9]):
            output = (tile - ORDERS[m][8]) * OUTPUTS + tl.arange(0, OUTPUTS)
            wanted = (output < ORDERS[m][5])[None, :]
            write = out + first * WRITE_WIDTH + (edge * WRITE_WIDTH)[:, None] + output[None, :]
            weight = weights + ORDERS[m][4] + (output * ORDERS[m][3])[None, :]
            if m == 0:
                total = product(read + ORDERS[0][1], weight, there, wanted, ORDERS[0][3],
                                PRECISION, ROUND, UPCAST, SUM, TILE, OUTPUTS, STEP)  # fmt: skip
                if bias is not None:
                    total += tl.load(bias + output[None, :], mask=wanted, other=0.0).to(SUM)
                tl.store(write + ORDERS[0][6], total, mask=there & wanted)
            else:
                plus, minus = pair_of_products(
                    read + ORDERS[m][1], read + ORDERS[m][2], weight, there, wanted,
                    ORDERS[m][3] * ORDERS[m][5], ORDERS[m][0], ORDERS[m][3], PRECISION, ROUND,
                    UPCAST, SUM, TILE, OUTPUTS, STEP)  # fmt: skip
                tl.store(write + ORDERS[m][6], plus, mask=there & wanted)
                tl.store(write + ORDERS[m][7], minus, mask=there & wanted)


@triton.jit
def write_opened(out, gated, at_out, at_gated, row, value, opening, kept,
                 CHANNELS: tl.constexpr):  # fmt: skip
    """Write a row as it is, if it is to be kept, and behind its gate."""
    if out is not None:
        tl.store(out + at_out + row * CHANNELS, value, mask=kept)
    tl.store(gated + at_gated + row * CHANNELS, value * opening, mask=kept)


@triton.jit
def map_and_gate(rows, weights, bias, out, gated, n_edges, READ_WIDTH: tl.constexpr,
                 CHANNELS: tl.constexpr, LMAX: tl.constexpr, MMAX: tl.constexpr,
                 N_ROWS: tl.constexpr, ORDERS: tl.constexpr, TOGETHER: tl.constexpr,
                 PRECISION: tl.constexpr, ROUND: tl.constexpr, UPCAST: tl.constexpr,
                 SUM: tl.constexpr, TILE: tl.constexpr, OUTPUTS: tl.constexpr,
                 STEP: tl.constexpr):  # fmt: skip
    """Write y = M rows + bias, if it is to be kept, and a(y); a program owns a degree of y.

    Its gate is made beside its row of m = 0 and waits in registers for the others.
    """
    BLOCKS: tl.constexpr = (CHANNELS + OUTPUTS - 1) // OUTPUTS
    edge_tile, tile = place_of_program(tl.cdiv(n_edges, TILE), (LMAX + 1) * BLOCKS, TOGETHER)
    first, edge = (edge_tile * TILE).to(tl.int64), tl.arange(0, TILE)
    degree = LMAX - tile // BLOCKS  # the longest first
    channel = tile % BLOCKS * OUTPUTS + tl.arange(0, OUTPUTS)
    there, wanted = (edge < n_edges - first)[:, None], (channel < CHANNELS)[None, :]
    kept = there & wanted
    read = rows + first * READ_WIDTH + (edge * READ_WIDTH)[:, None]
    if out is not None:
        out += first * ((LMAX + N_ROWS) * CHANNELS) + LMAX * CHANNELS
    gated += first * (N_ROWS * CHANNELS)
    at_out = (edge * ((LMAX + N_ROWS) * CHANNELS))[:, None] + channel[None, :]
    at_gated = (edge * (N_ROWS * CHANNELS))[:, None] + channel[None, :]
    # Outputs of m = 0: the gates of l = 1 ... LMAX, then rows of l = 0 ... LMAX.
    output = (LMAX + degree) * CHANNELS + channel
    BACK: tl.constexpr = (LMAX + 1) * CHANNELS
    value, gate = product_and_gate(
        read + ORDERS[0][1], weights + ORDERS[0][4] + (output * ORDERS[0][3])[None, :], there,
        wanted, BACK * ORDERS[0][3], degree > 0, ORDERS[0][3], PRECISION, ROUND, UPCAST, SUM,
        TILE, OUTPUTS, STEP)  # fmt: skip
    if bias is not None:
        value += tl.load(bias + output[None, :], mask=wanted, other=0.0).to(SUM)
        gate += tl.load(bias + output[None, :] - BACK, mask=wanted & (degree > 0),
                        other=0.0).to(SUM)  # fmt: skip
    if out is not None:
        tl.store(out + at_out + (degree - LMAX - 1) * CHANNELS, gate, mask=kept & (degree > 0))
    opening = tl.sigmoid(tl.where(degree > 0, gate, value))
    write_opened(out, gated, at_out, at_gated, degree, value, opening, kept, CHANNELS)
    for m in tl.static_range(1, MMAX + 1):
        if m <= degree:
            output = (degree - m) * CHANNELS + channel
            plus, minus = pair_of_products(
                read + ORDERS[m][1], read + ORDERS[m][2],
                weights + ORDERS[m][4] + (output * ORDERS[m][3])[None, :], there, wanted,
                ORDERS[m][3] * ORDERS[m][5], ORDERS[m][0], ORDERS[m][3], PRECISION, ROUND, UPCAST,
                SUM, TILE, OUTPUTS, STEP)  # fmt: skip
            write_opened(out, gated, at_out, at_gated, row_of(degree, m, 0, LMAX), plus, opening,
                         kept, CHANNELS)  # fmt: skip
            write_opened(out, gated, at_out, at_gated, row_of(degree, m, 1, LMAX), minus, opening,
                         kept, CHANNELS)  # fmt: skip


@triton.jit
def pull_back(y, also, pulls, value, result, at_y, at_rows, row, pull, gate, through, kept,
              higher, CHANNELS: tl.constexpr, LMAX: tl.constexpr,
              SUM: tl.constexpr):  # fmt: skip
    """Take a row's gradient through its gate; return what the gate feels of the rows so far."""
    at = at_y + (LMAX + row) * CHANNELS
    number = tl.load(y + at, mask=kept, other=0.0).to(SUM)
    if pulls is not None:
        tl.store(pulls + at_rows + row * CHANNELS, pull, mask=kept)
    if value is not None:
        tl.store(value + at_rows + row * CHANNELS, number * gate, mask=kept)
    through += pull * number
    opened = pull * gate
    if also is not None:
        opened += tl.load(also + at, mask=kept & higher, other=0.0).to(SUM)
    tl.store(result + at, opened, mask=kept & higher)
    return through


@triton.jit
def map_back_through_gate(rows, weights, y, also, pulls, value, result, n_edges,
                          READ_WIDTH: tl.constexpr, CHANNELS: tl.constexpr, LMAX: tl.constexpr,
                          MMAX: tl.constexpr, N_ROWS: tl.constexpr, ORDERS: tl.constexpr,
                          TOGETHER: tl.constexpr, PRECISION: tl.constexpr, ROUND: tl.constexpr,
                          UPCAST: tl.constexpr, SUM: tl.constexpr,
                          TILE: tl.constexpr, OUTPUTS: tl.constexpr,
                          STEP: tl.constexpr):  # fmt: skip
    """Write J^T M^T rows + also for the Jacobian J of the gate, and M^T rows and a(y) if wanted.

    A program owns a degree: its gate feels all orders, and their sum waits in registers.
    """
    BLOCKS: tl.constexpr = (CHANNELS + OUTPUTS - 1) // OUTPUTS
    edge_tile, tile = place_of_program(tl.cdiv(n_edges, TILE), (LMAX + 1) * BLOCKS, TOGETHER)
    first, edge = (edge_tile * TILE).to(tl.int64), tl.arange(0, TILE)
    degree = LMAX - tile // BLOCKS  # the longest first
    channel = tile % BLOCKS * OUTPUTS + tl.arange(0, OUTPUTS)
    there, wanted = (edge < n_edges - first)[:, None], (channel < CHANNELS)[None, :]
    kept, higher = there & wanted, degree > 0
    read = rows + first * READ_WIDTH + (edge * READ_WIDTH)[:, None]
    y += first * ((LMAX + N_ROWS) * CHANNELS)
    result += first * ((LMAX + N_ROWS) * CHANNELS)
    if also is not None:
        also += first * ((LMAX + N_ROWS) * CHANNELS)
    if pulls is not None:
        pulls += first * (N_ROWS * CHANNELS)
    if value is not None:
        value += first * (N_ROWS * CHANNELS)
    at_y = (edge * ((LMAX + N_ROWS) * CHANNELS))[:, None] + channel[None, :]
    # The gate of l = 0 is the row l = 0 itself, which lies behind those of l > 0.
    at_gate = at_y + tl.where(higher, degree - 1, LMAX) * CHANNELS
    at_rows = (edge * (N_ROWS * CHANNELS))[:, None] + channel[None, :]
    output = degree * CHANNELS + channel
    pull = product(read + ORDERS[0][1],
                   weights + ORDERS[0][4] + (output * ORDERS[0][3])[None, :], there, wanted,
                   ORDERS[0][3], PRECISION, ROUND, UPCAST, SUM, TILE, OUTPUTS, STEP)  # fmt: skip
    gate = tl.sigmoid(tl.load(y + at_gate, mask=kept, other=0.0).to(SUM))
    through = tl.zeros((TILE, OUTPUTS), dtype=SUM)
    through = pull_back(y, also, pulls, value, result, at_y, at_rows, degree, pull, gate, through,
                        kept, higher, CHANNELS, LMAX, SUM)  # fmt: skip
    through *= gate * (1.0 - gate)
    through += tl.where(higher, 0.0, pull * gate)
    for m in tl.static_range(1, MMAX + 1):
        if m <= degree:
            output = (degree - m) * CHANNELS + channel
            plus, minus = pair_of_products(
                read + ORDERS[m][1], read + ORDERS[m][2],
                weights + ORDERS[m][4] + (output * ORDERS[m][3])[None, :], there, wanted,
                ORDERS[m][3] * ORDERS[m][5], ORDERS[m][0], ORDERS[m][3], PRECISION, ROUND, UPCAST,
                SUM, TILE, OUTPUTS, STEP)  # fmt: skip
            own = tl.zeros((TILE, OUTPUTS), dtype=SUM)
            own = pull_back(y, also, pulls, value, result, at_y, at_rows,
                            row_of(degree, m, 0, LMAX), plus, gate, own, kept, higher, CHANNELS,
                            LMAX, SUM)  # fmt: skip
            own = pull_back(y, also, pulls, value, result, at_y, at_rows,
                            row_of(degree, m, 1, LMAX), minus, gate, own, kept, higher, CHANNELS,
                            LMAX, SUM)  # fmt: skip
            through += own * gate * (1.0 - gate)
    if also is not None:
        through += tl.load(also + at_gate, mask=kept, other=0.0).to(SUM)
    tl.store(result + at_gate, through, mask=kept)
