# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportOptionalOperand=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false
"""The kernels themselves; ``layout`` says how weights lie. Imported by ``launch`` when needed.

Both kernels compute ``x @ weight.T`` with the codes turned into floats exactly: a code put into
the mantissa of 2**23 is a float without a conversion instruction, and subtracting 2**23 + zero
leaves code - zero. The code may stay at the bit where it lies (up to bit 15): the power of two is
taken out of the factor it meets. Everything is converted to float32 right after it is loaded,
for the interpreter computes nothing in bf16; only ``tl.dot`` takes ``compute``.

``swiglu``: rows [0, rows) are gate, rows [rows, 2 rows) up; silu(gate) * up is stored.
"""

import triton
import triton.language as tl


@triton.jit
def lifted(words, zero, plane: tl.constexpr, bits: tl.constexpr):
    """(code - zero) * 2**bit of one plane, exact in float32."""
    bit: tl.constexpr = plane * bits % 16
    half = words >> 16 if plane * bits >= 16 else words
    mask: tl.constexpr = ((1 << bits) - 1) << bit
    raised = ((half & mask) | 0x4B000000).to(tl.float32, bitcast=True)
    return raised - (8388608.0 + zero * (1 << bit))


@triton.jit
def load_zeros(zeros, at, mask, bits: tl.constexpr):
    """Zero points as floats; without any, the middle of the range."""
    if zeros is None:
        zero = 1.0 * (1 << (bits - 1))
    else:
        zero = tl.load(zeros + at, mask=mask, other=0).to(tl.float32)
    return zero


@triton.jit
def decode_products(
    x, words, scales, zeros, n, rows, b, columns,
    blocks: tl.constexpr, groups: tl.constexpr, bits: tl.constexpr, group: tl.constexpr,
):  # fmt: skip
    """Sums of rows ``n`` over some blocks ``b``: [n, b], scales applied."""
    per: tl.constexpr = 32 // bits
    i = tl.arange(0, 4)
    inside = (n < rows)[:, None] & (b < blocks)[None, :]
    at = (n[:, None] * (blocks * 4) + b[None, :] * 4)[:, :, None] + i[None, None, :]
    word = tl.load(words + at, mask=inside[:, :, None], other=0)
    at_group = n[:, None] * groups + (b // (group // (4 * per)))[None, :]
    scale = tl.load(scales + at_group, mask=inside, other=0).to(tl.float32)
    zero = load_zeros(zeros, at_group, inside, bits)
    if zeros is not None:
        zero = zero[:, :, None]
    total = tl.zeros(word.shape, tl.float32)
    for plane in tl.static_range(per):
        k = b[:, None] * (4 * per) + plane * 4 + i[None, :]
        inputs = tl.load(x + k, mask=k < columns, other=0).to(tl.float32)
        inputs = inputs * (1.0 / (1 << plane * bits % 16))
        total += lifted(word, zero, plane, bits) * inputs[None, :, :]
    return tl.sum(total, 2) * scale


@triton.jit
def decode(
    x, words, scales, zeros, bias, ids, shares, out,
    columns, rows, experts, x_stride, out_stride,
    blocks: tl.constexpr, groups: tl.constexpr, bits: tl.constexpr, group: tl.constexpr,
    swiglu: tl.constexpr, block_n: tl.constexpr, block_b: tl.constexpr,
):  # fmt: skip
    """A few rows of one token: grid (tiles of rows, tokens). ``ids`` None: one matrix for all."""
    token = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    stored = n < rows
    if ids is not None:
        expert = tl.load(ids + token).to(tl.int64)
        if (expert < 0) | (expert >= experts):
            if not swiglu:  # the second launch: nobody else writes this row
                nothing = tl.zeros((block_n,), tl.float32).to(out.dtype.element_ty)
                tl.store(out + token * out_stride + n, nothing, mask=stored)
            return
        first = expert * (rows * (2 if swiglu else 1))
        words += first * blocks * 4
        scales += first * groups
        if zeros is not None:
            zeros += first * groups
    x += token * x_stride
    total = tl.zeros((block_n, block_b), tl.float32)
    up = tl.zeros((block_n, block_b), tl.float32)
    for start in range(0, blocks, block_b):
        b = start + tl.arange(0, block_b)
        total += decode_products(
            x, words, scales, zeros, n, rows, b, columns, blocks, groups, bits, group
        )
        if swiglu:
            up_zeros = None if zeros is None else zeros + rows * groups
            up += decode_products(
                x, words + rows * blocks * 4, scales + rows * groups, up_zeros,
                n, rows, b, columns, blocks, groups, bits, group,
            )  # fmt: skip
    result = tl.sum(total, 1)
    if swiglu:
        result = result / (1 + tl.exp(-result)) * tl.sum(up, 1)
    if bias is not None:
        result += tl.load(bias + n, mask=stored, other=0).to(tl.float32)
    if shares is not None:
        result *= tl.load(shares + token).to(tl.float32)
    tl.store(out + token * out_stride + n, result.to(out.dtype.element_ty), mask=stored)


@triton.jit
def prefill_factor(
    word, scale, zero, plane: tl.constexpr, bits: tl.constexpr, compute: tl.constexpr
):
    """The weights of one plane, [words, n]."""
    values = lifted(word, zero, plane, bits) * (scale * (1.0 / (1 << plane * bits % 16)))
    return values.to(compute)


@triton.jit
def prefill(
    x, words, scales, zeros, bias, order, tile_expert, tile_first, tile_last, shares, out,
    tokens, columns, rows, experts, x_stride, out_stride,
    blocks: tl.constexpr, groups: tl.constexpr, bits: tl.constexpr, group: tl.constexpr,
    swiglu: tl.constexpr, compute: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_b: tl.constexpr,
):  # fmt: skip
    """A tile of tokens of one expert by a tile of rows: grid (tiles of tokens, tiles of rows).

    ``order`` lists tokens sorted by expert, tile t is ``order[tile_first[t] : tile_last[t]]`` up
    to ``block_m``. The gate and up launch gathers tokens and stores them sorted; the down launch
    reads them sorted and stores them where they belong. ``order`` None: one matrix for all.
    """
    per: tl.constexpr = 32 // bits
    tile = tl.program_id(0)
    n = tl.program_id(1) * block_n + tl.arange(0, block_n)
    place = tile * block_m + tl.arange(0, block_m)
    last = tokens
    source = place.to(tl.int64)
    target = source
    if order is not None:
        expert = tl.load(tile_expert + tile).to(tl.int64)
        if expert >= experts:
            return
        place = tl.load(tile_first + tile) + tl.arange(0, block_m)
        last = tl.load(tile_last + tile)
        token = tl.load(order + place, mask=place < last, other=0).to(tl.int64)
        source = token if swiglu else place.to(tl.int64)
        target = place.to(tl.int64) if swiglu else token
        first = expert * (rows * (2 if swiglu else 1))
        words += first * blocks * 4
        scales += first * groups
        if zeros is not None:
            zeros += first * groups
    here = place < last
    j = tl.arange(0, 4 * block_b)
    total = tl.zeros((block_m, block_n), tl.float32)
    up = tl.zeros((block_m, block_n), tl.float32)
    for start in range(0, blocks, block_b):
        b = start + j // 4
        within = (b < blocks)[:, None] & (n < rows)[None, :]
        at = n[None, :] * (blocks * 4) + (start * 4 + j)[:, None]
        word = tl.load(words + at, mask=within, other=0)
        inside = within
        if block_b * 4 * per <= group:  # one group a step: a vector of scales, many registers less
            inside = (n < rows)[None, :]
            at_group = n[None, :] * groups + start // (group // (4 * per))
        else:
            at_group = n[None, :] * groups + (b // (group // (4 * per)))[:, None]
        scale = tl.load(scales + at_group, mask=inside, other=0).to(tl.float32)
        zero = load_zeros(zeros, at_group, inside, bits)
        if swiglu:
            up_words = words + rows * blocks * 4
            up_word = tl.load(up_words + at, mask=within, other=0)
            up_scale = tl.load(scales + rows * groups + at_group, mask=inside, other=0)
            up_scale = up_scale.to(tl.float32)
            up_zeros = None if zeros is None else zeros + rows * groups
            up_zero = load_zeros(up_zeros, at_group, inside, bits)
        for plane in tl.static_range(per):
            k = b * (4 * per) + plane * 4 + j % 4
            inputs = tl.load(
                x + source[:, None] * x_stride + k[None, :],
                mask=here[:, None] & (k < columns)[None, :],
                other=0,
            ).to(compute)
            factor = prefill_factor(word, scale, zero, plane, bits, compute)
            total = tl.dot(inputs, factor, total, input_precision="ieee")
            if swiglu:
                factor = prefill_factor(up_word, up_scale, up_zero, plane, bits, compute)
                up = tl.dot(inputs, factor, up, input_precision="ieee")
    if swiglu:
        total = total / (1 + tl.exp(-total)) * up
    if bias is not None:
        total += tl.load(bias + n, mask=n < rows, other=0).to(tl.float32)[None, :]
    if shares is not None:
        total *= tl.load(shares + target, mask=here, other=0).to(tl.float32)[:, None]
    tl.store(
        out + target[:, None] * out_stride + n[None, :],
        total.to(out.dtype.element_ty),
        mask=here[:, None] & (n < rows)[None, :],
    )
