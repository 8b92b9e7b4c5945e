"""What the rotations into and out of the edge frames do on the device; ``rotation.py`` starts it.

A program works on a tile (edges, rows of one degree, channels). Rows of an edge are in m-primary
order; the slots of a degree are 0, padding, +1, -1, +2, ...; a factor belongs to (l, |m|), which +m
and -m share. Offsets of edges and atoms are 64-bit, those within one are not.
"""

# Only Triton's compiler goes through tl.static_range; to a type checker it raises.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def row_of(l, m, minus, LMAX: tl.constexpr):
    """Return the place of (l, +m) or (l, -m) among the m-primary rows."""
    before = (LMAX + 1) + 2 * ((m - 1) * (LMAX + 1) - (m * (m - 1)) // 2)
    return tl.where(m == 0, l, before + minus * (LMAX + 1 - m) + l - m)


@triton.jit
def factor_of(l, m, LMAX: tl.constexpr):
    """Return the place of (l, |m|) among the factors that +m and -m share."""
    return m * (LMAX + 1) - (m * (m - 1)) // 2 + l - m


@triton.jit
def slots_of(l: tl.constexpr, LMAX: tl.constexpr, MMAX: tl.constexpr, SIZE: tl.constexpr):
    """Return order and m-primary row of each slot of a degree, and which of them there are."""
    slot = tl.arange(0, SIZE)
    m, minus = slot // 2, slot % 2
    real = (m <= l) & (m <= MMAX) & (m >= minus)  # there is no -0
    return m, tl.where(real, row_of(l, m, minus, LMAX), 0), real


@triton.jit
def add_rotated(total, features, matrix, row, present, inside, l: tl.constexpr, LMAX: tl.constexpr,
                CHANNELS: tl.constexpr, SUM: tl.constexpr):  # fmt: skip
    """Add the rows of degree l of W x, (edges, slots, channels)."""
    N_SPH: tl.constexpr = (LMAX + 1) * (LMAX + 1)
    for column in tl.static_range(l * l, (l + 1) * (l + 1)):
        element = tl.load(matrix + (row * N_SPH + column)[None, :], mask=present, other=0.0).to(SUM)
        feature = tl.load(features + column * CHANNELS, mask=inside, other=0.0).to(SUM)
        total += element[:, :, None] * feature[:, None, :]
    return total


@triton.jit
def linear_factors(radial, weight, bias, edge, there, number, present, RADIAL: tl.constexpr,
                   TILE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
                   SUM: tl.constexpr):  # fmt: skip
    """Return some factors of some edges, h A^T + b."""
    inner = tl.arange(0, TILE)
    values = tl.load(radial + (edge * RADIAL)[:, None] + inner[None, :],
                     mask=there[:, None] & (inner < RADIAL)[None, :], other=0.0)  # fmt: skip
    matrix = tl.load(weight + (number * RADIAL)[None, :] + inner[:, None],
                     mask=(inner < RADIAL)[:, None] & present[None, :], other=0.0)  # fmt: skip
    if UPCAST:  # bf16 products fail in the interpreter
        values, matrix = values.to(tl.float32), matrix.to(tl.float32)
    found = tl.dot(values, matrix, input_precision=PRECISION).to(SUM)
    if bias is not None:
        found += tl.load(bias + number, mask=present, other=0.0).to(SUM)[None, :]
    return found


@triton.jit
def rotate_in(x, other, wigner, other_wigner, source, target, scale, other_scale, radial,
              radial_weight, radial_bias, result, n_edges, RADIAL: tl.constexpr,
              RADIAL_TILE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
              WIDTH: tl.constexpr, CHANNELS: tl.constexpr, LMAX: tl.constexpr, MMAX: tl.constexpr,
              N_ROWS: tl.constexpr, SLOTS: tl.constexpr, SUM: tl.constexpr, BLOCK_E: tl.constexpr,
              BLOCK_C: tl.constexpr):  # fmt: skip
    """Write s (W G x + W' G o) + s' W G o, of what there is."""
    N_SPH: tl.constexpr = (LMAX + 1) * (LMAX + 1)
    N_SCALES: tl.constexpr = (N_ROWS + LMAX + 1) // 2
    edge = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    side = tl.program_id(2)
    there = edge < n_edges
    edge = edge.to(tl.int64)
    atom = edge
    if source is not None:
        atom = tl.load(source + edge, mask=there, other=0).to(tl.int64)
    if target is not None:
        end = tl.load(target + edge, mask=there, other=0).to(tl.int64)
        atom = tl.where(side == 0, atom, end)
    inside = there[:, None] & (channel < CHANNELS)[None, :]
    at_atom = (atom * (N_SPH * CHANNELS))[:, None] + channel[None, :]
    at_matrix = (edge * (N_ROWS * N_SPH))[:, None]
    own = (side * CHANNELS + channel)[None, None, :]
    for l in tl.static_range(LMAX + 1):
        m, row, real = slots_of(l, LMAX, MMAX, SLOTS[l])
        total = tl.zeros((BLOCK_E, tl.constexpr(SLOTS[l]), BLOCK_C), dtype=SUM)
        if x is not None:
            total = add_rotated(total, x + at_atom, wigner + at_matrix, row, there[:, None], inside,
                                l, LMAX, CHANNELS, SUM)  # fmt: skip
        if other_wigner is not None:
            total = add_rotated(total, other + at_atom, other_wigner + at_matrix, row,
                                there[:, None], inside, l, LMAX, CHANNELS, SUM)  # fmt: skip
        kept = inside[:, None, :] & real[None, :, None]
        factor = (edge * (N_SCALES * WIDTH))[:, None, None] + own
        factor += (factor_of(l, m, LMAX) * WIDTH)[None, :, None]
        if scale is not None:
            total *= tl.load(scale + factor, mask=kept, other=0.0).to(SUM)
        if radial is not None:
            factors = tl.zeros((BLOCK_E, tl.constexpr(SLOTS[l]), BLOCK_C), dtype=SUM)
            for order in tl.static_range(min(l, MMAX) + 1):
                number = factor_of(l, order, LMAX) * WIDTH + side * CHANNELS + channel
                own_factors = linear_factors(radial, radial_weight, radial_bias, edge, there,
                                             number, channel < CHANNELS, RADIAL, RADIAL_TILE,
                                             PRECISION, UPCAST, SUM)  # fmt: skip
                factors = tl.where((m == order)[None, :, None], own_factors[:, None, :], factors)
            total *= factors
        if other_scale is not None:
            rows = tl.zeros((BLOCK_E, tl.constexpr(SLOTS[l]), BLOCK_C), dtype=SUM)
            rows = add_rotated(rows, other + at_atom, wigner + at_matrix, row, there[:, None],
                               inside, l, LMAX, CHANNELS, SUM)  # fmt: skip
            total += rows * tl.load(other_scale + factor, mask=kept, other=0.0).to(SUM)
        out = (result + edge * (N_ROWS * WIDTH))[:, None, None] + own
        tl.store(out + (row * WIDTH)[None, :, None], total, mask=kept)


@triton.jit
def add_lab_rows(total, y, at, wigner, at_matrix, scale, at_scale, present, inside, l: tl.constexpr,
                 LMAX: tl.constexpr, MMAX: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
                 SUM: tl.constexpr):  # fmt: skip
    """Add the coefficients of degree l of W^T s y, (edges, 2 l + 1 and padding, channels)."""
    N_SPH: tl.constexpr = (LMAX + 1) * (LMAX + 1)
    place = tl.arange(0, SIZE)
    # The padding of the last degree would read beyond the matrix; what it makes is not used.
    column = at_matrix + tl.where(place < 2 * l + 1, l * l + place, 0)[None, :]
    for slot in tl.static_range(2 * l + 2):
        if slot != 1 and slot // 2 <= MMAX:  # there is no -0
            row = row_of(l, slot // 2, slot % 2, LMAX)
            element = tl.load(wigner + row * N_SPH + column, mask=present, other=0.0).to(SUM)
            feature = tl.load(y + row * WIDTH + at, mask=inside, other=0.0).to(SUM)
            if scale is not None:
                factor = scale + factor_of(l, slot // 2, LMAX) * WIDTH + at_scale
                feature *= tl.load(factor, mask=inside, other=0.0).to(SUM)
            total += element[:, :, None] * feature[:, None, :]
    return total


@triton.jit
def add_moved_lab_rows(total, y, other, at, wigner, other_wigner, at_matrix, scale, other_scale,
                       at_scale, present, inside, l: tl.constexpr, LMAX: tl.constexpr,
                       MMAX: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
                       SUM: tl.constexpr):  # fmt: skip
    """Add those of W^T s y + W'^T s o + W^T s' o, of what there is."""
    if y is not None:
        total = add_lab_rows(total, y, at, wigner, at_matrix, scale, at_scale, present, inside, l,
                             LMAX, MMAX, WIDTH, SIZE, SUM)  # fmt: skip
    if other_wigner is not None:
        total = add_lab_rows(total, other, at, other_wigner, at_matrix, scale, at_scale, present,
                             inside, l, LMAX, MMAX, WIDTH, SIZE, SUM)  # fmt: skip
    if other_scale is not None:
        total = add_lab_rows(total, other, at, wigner, at_matrix, other_scale, at_scale, present,
                             inside, l, LMAX, MMAX, WIDTH, SIZE, SUM)  # fmt: skip
    return total


@triton.jit
def rotate_back_and_sum(y, other, wigner, other_wigner, pointer, other_pointer, order, other_order,
                        scale, other_scale, envelope, other_envelope, result, SIDES: tl.constexpr,
                        CHANNELS: tl.constexpr, LMAX: tl.constexpr, MMAX: tl.constexpr,
                        N_ROWS: tl.constexpr, DEGREES: tl.constexpr, ADDING: tl.constexpr,
                        SUM: tl.constexpr, BLOCK_E: tl.constexpr,
                        BLOCK_C: tl.constexpr):  # fmt: skip
    """Sum W^T f s y + W'^T f s o + W^T (f s' + f' s) o on the atoms, of what there is."""
    N_SPH: tl.constexpr = (LMAX + 1) * (LMAX + 1)
    N_SCALES: tl.constexpr = (N_ROWS + LMAX + 1) // 2
    WIDTH: tl.constexpr = SIDES * CHANNELS
    atom = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    for l in tl.static_range(LMAX + 1):
        if tl.program_id(1) == l:  # a branch that a whole program takes
            total = tl.zeros((BLOCK_E, tl.constexpr(DEGREES[l]), BLOCK_C), dtype=SUM)
            for side in tl.static_range(SIDES):
                starts = pointer if side == 0 else other_pointer
                edges = order if side == 0 else other_order
                begin, last = tl.load(starts + atom), tl.load(starts + atom + 1)
                while begin < last:  # not range(): the interpreter has none over loaded numbers
                    edge = begin + tl.arange(0, BLOCK_E)
                    there = edge < last
                    edge = tl.load(edges + edge, mask=there, other=0).to(tl.int64)
                    present, inside = there[:, None], there[:, None] & (channel < CHANNELS)[None, :]
                    at = (edge * (N_ROWS * WIDTH))[:, None] + (side * CHANNELS + channel)[None, :]
                    at_scale = (edge * (N_SCALES * WIDTH))[:, None]
                    at_scale += (side * CHANNELS + channel)[None, :]
                    at_matrix = (edge * (N_ROWS * N_SPH))[:, None]
                    part = tl.zeros((BLOCK_E, tl.constexpr(DEGREES[l]), BLOCK_C), dtype=SUM)
                    if envelope is None:
                        part = total
                    part = add_moved_lab_rows(
                        part, y, other, at, wigner, other_wigner, at_matrix, scale, other_scale,
                        at_scale, present, inside, l, LMAX, MMAX, WIDTH, DEGREES[l],
                        SUM)  # fmt: skip
                    if envelope is None:
                        total = part
                    else:
                        factor = tl.load(envelope + edge, mask=there, other=0.0).to(SUM)
                        total += factor[:, None, None] * part
                    if other_envelope is not None:
                        part = tl.zeros((BLOCK_E, tl.constexpr(DEGREES[l]), BLOCK_C), dtype=SUM)
                        part = add_lab_rows(part, other, at, wigner, at_matrix, scale, at_scale,
                                            present, inside, l, LMAX, MMAX, WIDTH, DEGREES[l],
                                            SUM)  # fmt: skip
                        factor = tl.load(other_envelope + edge, mask=there, other=0.0).to(SUM)
                        total += factor[:, None, None] * part
                    begin += BLOCK_E
            place = tl.arange(0, DEGREES[l])
            kept = (place < 2 * l + 1)[:, None] & (channel < CHANNELS)[None, :]
            out = (
                result
                + atom * (N_SPH * CHANNELS)
                + ((l * l + place)[:, None] * CHANNELS + channel[None, :])
            )
            summed = tl.sum(total, axis=0)
            if ADDING:
                summed += tl.load(out, mask=kept, other=0.0).to(SUM)
            tl.store(out, summed, mask=kept)


@triton.jit
def rotate_back(y, wigner, envelope, result, n_edges, CHANNELS: tl.constexpr, LMAX: tl.constexpr,
                MMAX: tl.constexpr, N_ROWS: tl.constexpr, DEGREES: tl.constexpr,
                ADDING: tl.constexpr, SUM: tl.constexpr, BLOCK_E: tl.constexpr,
                BLOCK_C: tl.constexpr):  # fmt: skip
    """Write W^T f y of every edge, or add it."""
    N_SPH: tl.constexpr = (LMAX + 1) * (LMAX + 1)
    edge = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = edge < n_edges
    edge = edge.to(tl.int64)
    inside = there[:, None] & (channel < CHANNELS)[None, :]
    at = (edge * (N_ROWS * CHANNELS))[:, None] + channel[None, :]
    at_matrix = (edge * (N_ROWS * N_SPH))[:, None]
    out = (result + edge * (N_SPH * CHANNELS))[:, None, None] + channel[None, None, :]
    for l in tl.static_range(LMAX + 1):
        lab = tl.zeros((BLOCK_E, tl.constexpr(DEGREES[l]), BLOCK_C), dtype=SUM)
        lab = add_lab_rows(lab, y, at, wigner, at_matrix, None, at, there[:, None], inside, l, LMAX,
                           MMAX, CHANNELS, DEGREES[l], SUM)  # fmt: skip
        if envelope is not None:
            lab *= tl.load(envelope + edge, mask=there, other=0.0).to(SUM)[:, None, None]
        place = tl.arange(0, DEGREES[l])
        kept = inside[:, None, :] & (place < 2 * l + 1)[None, :, None]
        place_out = out + ((l * l + place) * CHANNELS)[None, :, None]
        if ADDING:
            lab += tl.load(place_out, mask=kept, other=0.0).to(SUM)
        tl.store(place_out, lab, mask=kept)


@triton.jit
def add_torque(about_x, about_y, about_z, features, lab, neighbours, coefficients, inside,
               l: tl.constexpr, CHANNELS: tl.constexpr, TERMS: tl.constexpr, SIZE: tl.constexpr,
               SUM: tl.constexpr):  # fmt: skip
    """Add <lab, X_k x> of degree l for the three generators."""
    place = tl.arange(0, SIZE)
    real = place < 2 * l + 1
    column = tl.where(real, l * l + place, 0)
    kept = inside[:, None, :] & real[None, :, None]
    for q in tl.static_range(5):
        neighbour = tl.load(neighbours + column * 5 + q)
        element = tl.load(coefficients + column * 5 + q).to(SUM)
        feature = features[:, None, :] + (neighbour * CHANNELS)[None, :, None]
        product = tl.load(feature, mask=kept, other=0.0).to(SUM) * lab * element[None, :, None]
        part = tl.sum(tl.sum(product, axis=1), axis=1)
        if TERMS[q] == 0:
            about_x += part
        elif TERMS[q] == 1:
            about_y += part
        else:
            about_z += part
    return about_x, about_y, about_z


@triton.jit
def write_pair_sums(through, products, at_scale, inside, l: tl.constexpr, LMAX: tl.constexpr,
                    MMAX: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
                    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Write products summed over +m and -m, which are neighbours among the slots of a degree."""
    pairs: tl.constexpr = SIZE // 2
    total = tl.sum(tl.reshape(products, (BLOCK_E, pairs, 2, BLOCK_C)), axis=2)
    order = tl.arange(0, pairs)
    kept = inside[:, None, :] & ((order <= l) & (order <= MMAX))[None, :, None]
    number = at_scale[:, None, :] + (factor_of(l, order, LMAX) * WIDTH)[None, :, None]
    tl.store(through + number, total, mask=kept)


@triton.jit
def rotation_gradient(x, wigner, source, target, y, scale, envelope, also, neighbours,  # noqa: C901
                      coefficients, entered, through, rotated, to_envelope, turn, n_edges,
                      SIDES: tl.constexpr, CHANNELS: tl.constexpr, LMAX: tl.constexpr,
                      MMAX: tl.constexpr, N_ROWS: tl.constexpr, SLOTS: tl.constexpr,
                      DEGREES: tl.constexpr, TERMS: tl.constexpr, SIGN: tl.constexpr,
                      SUM: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Differentiate <y, f s W G x>: all that edges get of it, each only if it is not None.

    These are s W G x, the products of y and W G x summed over +m and -m, f W G x and what is
    ``also`` there, <y, W G x>, and the torque, which is added with a sign.
    """
    N_SPH: tl.constexpr = (LMAX + 1) * (LMAX + 1)
    N_SCALES: tl.constexpr = (N_ROWS + LMAX + 1) // 2
    WIDTH: tl.constexpr = SIDES * CHANNELS
    edge = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    there = edge < n_edges
    edge = edge.to(tl.int64)
    at_matrix = (edge * (N_ROWS * N_SPH))[:, None]
    about_x = tl.zeros((BLOCK_E,), dtype=SUM)
    about_y = tl.zeros((BLOCK_E,), dtype=SUM)
    about_z = tl.zeros((BLOCK_E,), dtype=SUM)
    overlap = tl.zeros((BLOCK_E,), dtype=SUM)
    factor = tl.full((BLOCK_E,), 1.0, dtype=SUM)
    if envelope is not None:
        factor *= tl.load(envelope + edge, mask=there, other=0.0).to(SUM)
    for side in tl.static_range(SIDES):
        atom = edge
        if source is not None:
            index = source if side == 0 else target
            atom = tl.load(index + edge, mask=there, other=0).to(tl.int64)
        for start in range(0, CHANNELS, BLOCK_C):
            channel = start + tl.arange(0, BLOCK_C)
            inside = there[:, None] & (channel < CHANNELS)[None, :]
            features = x + (atom * (N_SPH * CHANNELS))[:, None] + channel[None, :]
            at = (edge * (N_ROWS * WIDTH))[:, None] + (side * CHANNELS + channel)[None, :]
            at_scale = (edge * (N_SCALES * WIDTH))[:, None] + (side * CHANNELS + channel)[None, :]
            for l in tl.static_range(LMAX + 1):
                m, row, real = slots_of(l, LMAX, MMAX, SLOTS[l])
                kept = inside[:, None, :] & real[None, :, None]
                place = at[:, None, :] + (row * WIDTH)[None, :, None]
                if entered is not None or through is not None or rotated is not None:
                    total = tl.zeros((BLOCK_E, tl.constexpr(SLOTS[l]), BLOCK_C), dtype=SUM)
                    total = add_rotated(total, features, wigner + at_matrix, row, there[:, None],
                                        inside, l, LMAX, CHANNELS, SUM)  # fmt: skip
                    if entered is not None:
                        value = total
                        if scale is not None:
                            number = (factor_of(l, m, LMAX) * WIDTH)[None, :, None]
                            value *= tl.load(scale + at_scale[:, None, :] + number, mask=kept,
                                             other=0.0).to(SUM)  # fmt: skip
                        tl.store(entered + place, value, mask=kept)
                    if rotated is not None:
                        value = total * factor[:, None, None]
                        if also is not None:
                            value += tl.load(also + place, mask=kept, other=0.0).to(SUM)
                        tl.store(rotated + place, value, mask=kept)
                    if y is not None:
                        total *= tl.load(y + place, mask=kept, other=0.0).to(SUM)
                        overlap += tl.sum(tl.sum(total, axis=1), axis=1)
                    if through is not None:
                        write_pair_sums(through, total, at_scale, inside, l, LMAX, MMAX, WIDTH,
                                        SLOTS[l], BLOCK_E, BLOCK_C)  # fmt: skip
                if turn is not None and l > 0:
                    lab = tl.zeros((BLOCK_E, tl.constexpr(DEGREES[l]), BLOCK_C), dtype=SUM)
                    lab = add_lab_rows(lab, y, at, wigner, at_matrix, scale, at_scale,
                                       there[:, None], inside, l, LMAX, MMAX, WIDTH, DEGREES[l],
                                       SUM)  # fmt: skip
                    about_x, about_y, about_z = add_torque(
                        about_x, about_y, about_z, features, lab, neighbours, coefficients, inside,
                        l, CHANNELS, TERMS, DEGREES[l], SUM)  # fmt: skip
    if to_envelope is not None:
        tl.store(to_envelope + edge, overlap, mask=there)
    if turn is not None:
        out = turn + edge * 3
        factor *= SIGN
        about_x = tl.load(out, mask=there, other=0.0).to(SUM) + factor * about_x
        about_y = tl.load(out + 1, mask=there, other=0.0).to(SUM) + factor * about_y
        about_z = tl.load(out + 2, mask=there, other=0.0).to(SUM) + factor * about_z
        tl.store(out, about_x, mask=there)
        tl.store(out + 1, about_y, mask=there)
        tl.store(out + 2, about_z, mask=there)


@triton.jit
def rotation_gradient_along(x, moved_x, wigner, moved_wigner, source, target, y,  # noqa: C901
                            moved_y, scale, moved_scale, envelope, moved_envelope, angle,
                            neighbours, coefficients, through, moved_through, rotated, overlap,
                            turn, n_edges, SIDES: tl.constexpr, CHANNELS: tl.constexpr,
                            LMAX: tl.constexpr, MMAX: tl.constexpr, N_ROWS: tl.constexpr,
                            SLOTS: tl.constexpr, DEGREES: tl.constexpr, TERMS: tl.constexpr,
                            SUM: tl.constexpr, BLOCK_E: tl.constexpr,
                            BLOCK_C: tl.constexpr):  # fmt: skip
    """Differentiate what ``rotation_gradient`` writes along a direction, if it is not None."""
    N_SPH: tl.constexpr = (LMAX + 1) * (LMAX + 1)
    N_SCALES: tl.constexpr = (N_ROWS + LMAX + 1) // 2
    WIDTH: tl.constexpr = SIDES * CHANNELS
    edge = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    there = edge < n_edges
    present = there[:, None]
    edge = edge.to(tl.int64)
    at_matrix = (edge * (N_ROWS * N_SPH))[:, None]
    about_x = tl.zeros((BLOCK_E,), dtype=SUM)
    about_y, about_z = about_x, about_x  # T' - t x T, of the torque T
    plain_x, plain_y, plain_z = about_x, about_x, about_x  # T
    overlaps = about_x
    factor = tl.full((BLOCK_E,), 1.0, dtype=SUM)
    if envelope is not None:
        factor *= tl.load(envelope + edge, mask=there, other=0.0).to(SUM)
    moved_factor = tl.zeros((BLOCK_E,), dtype=SUM)
    if moved_envelope is not None:
        moved_factor += tl.load(moved_envelope + edge, mask=there, other=0.0).to(SUM)
    for side in tl.static_range(SIDES):
        atom = edge
        if source is not None:
            index = source if side == 0 else target
            atom = tl.load(index + edge, mask=there, other=0).to(tl.int64)
        for start in range(0, CHANNELS, BLOCK_C):
            channel = start + tl.arange(0, BLOCK_C)
            inside = present & (channel < CHANNELS)[None, :]
            at_atom = (atom * (N_SPH * CHANNELS))[:, None] + channel[None, :]
            at = (edge * (N_ROWS * WIDTH))[:, None] + (side * CHANNELS + channel)[None, :]
            at_scale = (edge * (N_SCALES * WIDTH))[:, None] + (side * CHANNELS + channel)[None, :]
            for l in tl.static_range(LMAX + 1):
                _, row, real = slots_of(l, LMAX, MMAX, SLOTS[l])
                kept = inside[:, None, :] & real[None, :, None]
                place = at[:, None, :] + (row * WIDTH)[None, :, None]
                if (through is not None or moved_through is not None or rotated is not None
                        or overlap is not None):  # fmt: skip
                    none = tl.zeros((BLOCK_E, tl.constexpr(SLOTS[l]), BLOCK_C), dtype=SUM)
                    r = add_rotated(none, x + at_atom, wigner + at_matrix, row, present, inside, l,
                                    LMAX, CHANNELS, SUM)  # fmt: skip
                    moved_r = none
                    if moved_x is not None:
                        moved_r = add_rotated(moved_r, moved_x + at_atom, wigner + at_matrix, row,
                                              present, inside, l, LMAX, CHANNELS, SUM)  # fmt: skip
                    if moved_wigner is not None:
                        moved_r = add_rotated(moved_r, x + at_atom, moved_wigner + at_matrix, row,
                                              present, inside, l, LMAX, CHANNELS, SUM)  # fmt: skip
                    if rotated is not None:
                        value = factor[:, None, None] * moved_r
                        if moved_envelope is not None:
                            value += moved_factor[:, None, None] * r
                        tl.store(rotated + place, value, mask=kept)
                    if through is not None or moved_through is not None or overlap is not None:
                        own = tl.load(y + place, mask=kept, other=0.0).to(SUM)
                        moved_r *= own
                        if moved_y is not None:
                            moved_r += tl.load(moved_y + place, mask=kept, other=0.0).to(SUM) * r
                        if overlap is not None:
                            overlaps += tl.sum(tl.sum(moved_r, axis=1), axis=1)
                        if moved_through is not None:
                            write_pair_sums(moved_through, moved_r, at_scale, inside, l, LMAX, MMAX,
                                            WIDTH, SLOTS[l], BLOCK_E, BLOCK_C)  # fmt: skip
                        if through is not None:
                            write_pair_sums(through, own * r, at_scale, inside, l, LMAX, MMAX,
                                            WIDTH, SLOTS[l], BLOCK_E, BLOCK_C)  # fmt: skip
                if turn is not None and l > 0:
                    none = tl.zeros((BLOCK_E, tl.constexpr(DEGREES[l]), BLOCK_C), dtype=SUM)
                    lab = add_lab_rows(none, y, at, wigner, at_matrix, scale, at_scale, present,
                                       inside, l, LMAX, MMAX, WIDTH, DEGREES[l], SUM)  # fmt: skip
                    moved_lab = add_moved_lab_rows(
                        none, moved_y, y, at, wigner, moved_wigner, at_matrix, scale, moved_scale,
                        at_scale, present, inside, l, LMAX, MMAX, WIDTH, DEGREES[l],
                        SUM)  # fmt: skip
                    moved_lab *= factor[:, None, None]
                    if moved_envelope is not None:
                        moved_lab += moved_factor[:, None, None] * lab
                    lab *= factor[:, None, None]
                    about_x, about_y, about_z = add_torque(
                        about_x, about_y, about_z, x + at_atom, moved_lab, neighbours, coefficients,
                        inside, l, CHANNELS, TERMS, DEGREES[l], SUM)  # fmt: skip
                    if moved_x is not None:
                        about_x, about_y, about_z = add_torque(
                            about_x, about_y, about_z, moved_x + at_atom, lab, neighbours,
                            coefficients, inside, l, CHANNELS, TERMS, DEGREES[l], SUM)  # fmt: skip
                    if angle is not None:
                        plain_x, plain_y, plain_z = add_torque(
                            plain_x, plain_y, plain_z, x + at_atom, lab, neighbours, coefficients,
                            inside, l, CHANNELS, TERMS, DEGREES[l], SUM)  # fmt: skip
    if overlap is not None:
        tl.store(overlap + edge, overlaps, mask=there)
    if turn is not None:
        if angle is not None:
            t_x = tl.load(angle + edge * 3, mask=there, other=0.0).to(SUM)
            t_y = tl.load(angle + edge * 3 + 1, mask=there, other=0.0).to(SUM)
            t_z = tl.load(angle + edge * 3 + 2, mask=there, other=0.0).to(SUM)
            about_x -= t_y * plain_z - t_z * plain_y
            about_y -= t_z * plain_x - t_x * plain_z
            about_z -= t_x * plain_y - t_y * plain_x
        out = turn + edge * 3
        tl.store(out, tl.load(out, mask=there, other=0.0).to(SUM) - about_x, mask=there)
        tl.store(out + 1, tl.load(out + 1, mask=there, other=0.0).to(SUM) - about_y, mask=there)
        tl.store(out + 2, tl.load(out + 2, mask=there, other=0.0).to(SUM) - about_z, mask=there)
