"""Products of few rows: the kernel against float64 for every instruction set, and where it is put."""

from __future__ import annotations

import functools
import logging
from typing import Any

import latent
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from latent.kernels import gemv_library
from latent.kernels.cpp_library import compiler, isa
from latent.kernels.cpp_source import ISAS
from latent.kernels.gemv import gemv_of_used, join_products, kernel_for, product_of, reference, small_products
from latent.kernels.gemv_library import MOST_ROWS, GemvSpec, Products, build, source
from latent.rewriter.capture import capture
from latent.rewriter.kernel_sources import kernel_sources
from latent.rewriter.lower import lower
from torch import Tensor, fx, nn

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

BY_NAME = {level.name: level for level in ISAS}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of the largest element: half a unit of the result is 5e-4 in float16 and 4e-3 in bfloat16."""


@functools.cache
def built(spec: GemvSpec, level: str) -> Any:
    return build(spec, BY_NAME[level])[1]


def error(products: Products, made: list[Tensor]) -> float:
    """The largest difference from float64, relative to the largest element."""
    worst = 0.0
    for out, weight, bias in zip(made, products.weights, products.biases, strict=True):
        expected = products.rows.double() @ weight.double().mT + (0 if bias is None else bias.double())
        if products.used is not None:
            by_columns = weight.stride(0) == 1
            on = products.used.repeat_interleave(weight.shape[by_columns] // len(products.used))
            if by_columns:  # inputs
                expected = (products.rows * on).double() @ weight.double().mT + (0 if bias is None else bias.double())
            else:
                expected = expected * on
        assert out.shape == expected.shape and out.dtype == products.rows.dtype
        worst = max(worst, ((out.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-2)).item())
    return worst


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("skips", [False, True], ids=["all heads", "used heads"])
@pytest.mark.parametrize("by_columns", [False, True], ids=["lines", "columns"])
@pytest.mark.parametrize("level", sorted({isa().name, "portable"}))
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_equals_float64(dtype: torch.dtype, by_columns: bool, skips: bool, level: str, rows: int) -> None:
    spec = GemvSpec(dtype, rows, by_columns, skips)
    for products in small_products(spec):
        assert error(products, built(spec, level)(products)) < TOLERANCE[dtype]
        assert error(products, reference(products)) < TOLERANCE[dtype]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    dtype, rows = draw(st.sampled_from(DTYPES)), draw(st.integers(1, MOST_ROWS))
    inputs, heads = draw(st.integers(1, 90)), draw(st.sampled_from([None, 1, 3]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def weight() -> Tensor:
        outputs = draw(st.integers(1, 300))
        many = () if heads is None else (heads,)
        kind = draw(st.sampled_from(["lines", "columns", "gaps", "every second"]))
        if kind == "lines":
            return tensor(*many, outputs, inputs)
        if kind == "columns":
            return tensor(*many, inputs, outputs).mT
        if kind == "gaps":
            return tensor(*many, outputs, inputs + 3)[..., 1:-2]
        return tensor(*many, outputs, 2 * inputs)[..., ::2]

    weights = [weight() for _ in range(1 if heads else draw(st.integers(1, 3)))]
    biases = [draw(st.sampled_from([None, tensor(w.shape[-2])])) for w in weights]
    given_rows = tensor(rows, inputs) if heads is None else tensor(inputs, heads, rows).permute(1, 2, 0)
    products = Products(given_rows, weights, biases)
    assert error(products, torch.ops.latent.gemv(*products[:3])) < TOLERANCE[dtype]


@pytest.mark.parametrize("by_columns", [False, True], ids=["lines", "columns"])
def test_numbers_that_are_none_reach_their_outputs_alone(by_columns: bool) -> None:
    weight = torch.randn(200, 300)
    weight[3, 7], weight[150, 0] = float("nan"), float("inf")
    weight = weight.t().contiguous().t() if by_columns else weight
    (out,) = torch.ops.latent.gemv(torch.ones(1, 300), [weight], [None])
    assert out[0, 3].isnan() and out[0, 150] == float("inf") and out.isfinite().sum() == 198


@pytest.mark.parametrize("by_columns", [False, True], ids=["lines", "columns"])
def test_lines_of_heads_that_no_row_uses_are_not_read(by_columns: bool) -> None:
    """4 heads of 70 lines, which is no multiple of anything; a head is read if one of two rows uses it."""
    weight, used = torch.randn(280, 280), torch.tensor([[True, False, False, False], [True, False, True, False]])
    at = torch.tensor([1, 3]).mul(70)[:, None] + torch.arange(70)
    rows = torch.randn(2, 280)
    broken, masked, on = weight.clone(), rows, used.any(0).repeat_interleave(70)
    if by_columns:
        broken[:, at], masked = torch.nan, rows * on
        broken = broken.t().contiguous().t()
    else:
        broken[at] = torch.nan
    expected = masked @ weight.T * (1 if by_columns else on)
    torch.testing.assert_close(gemv_of_used(rows, broken, None, used), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("by_columns", [False, True], ids=["lines", "columns"])
def test_results_do_not_depend_on_the_number_of_threads(by_columns: bool) -> None:
    rows, weight, before = torch.randn(2, 512), torch.randn(900, 512), torch.get_num_threads()
    weight = weight.t().contiguous().t() if by_columns else weight
    try:
        made = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            made += torch.ops.latent.gemv(rows, [weight], [None])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows \(1, 300\) and a weight \(200, 299\) do not fit"):
        torch.ops.latent.gemv(torch.ones(1, 300), [torch.ones(200, 299)], [None])
    with pytest.raises(ValueError, match="do not fit"):
        torch.ops.latent.gemv(torch.ones(2, 1, 300), [torch.ones(3, 200, 300)], [None])


@pytest.mark.parametrize("level", ISAS, ids=lambda level: level.name)
def test_sources_are_legible_and_of_one_instruction_set(level: Any) -> None:
    text = source(GemvSpec(torch.bfloat16, 1, False), level)
    assert text.startswith(f"// gemv_bf16_1 for {level.name}")
    assert ("BF16_DOT = true" in text) == level.bf16_dot


def test_a_broken_kernel_is_replaced_by_its_definition(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    monkeypatch.setenv("LATENT_CACHE", str(tmp_path))
    part = gemv_library.part
    monkeypatch.setattr(gemv_library, "part", lambda name: part(name).replace("bias_of(p, n + i)", "0.f"))
    kernel_for.cache_clear()
    with caplog.at_level(logging.WARNING):
        kernels = [kernel_for(GemvSpec(torch.float32, 1, False)) for _ in range(2)]
    kernel_for.cache_clear()
    assert kernels == [reference, reference]
    assert len(caplog.records) == 1 and "relative error" in caplog.text and "plain operators run" in caplog.text


# ------------------------------------------------------------------ where it is put


def lowered(function: Any, *inputs: Tensor, gradients: bool = False) -> tuple[fx.GraphModule, list[str]]:
    """A function's graph after `join_products`, and what it said."""
    with torch.set_grad_enabled(gradients):
        gm = capture(fx.symbolic_trace(function), inputs)
        said = [reason for _, reason in join_products(gm.graph, gradients)]
        gm.recompile()
    return gm, said


RTOL = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Of sums of 256 products, in another order."""


def calls(gm: fx.GraphModule) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=torch.ops.latent.gemv.default))


def identities(x: Tensor, a: Tensor) -> tuple[Tensor, ...]:
    return x @ a.transpose(1, 1), x @ a.permute(0, 1), x @ a.T, x @ a.permute(1, 0)


def test_a_transposed_square_is_told_from_one_that_is_not() -> None:
    args = torch.randn(1, 192), torch.randn(192, 192)
    gm, _ = lowered(identities, *args)
    assert calls(gm) == 2, "the two that are transposed, and the two that are not"
    for ours, expected in zip(gm(*args), identities(*args), strict=True):
        torch.testing.assert_close(ours, expected, rtol=RTOL[ours.dtype], atol=RTOL[ours.dtype])


_drawn = torch.Generator().manual_seed(0)
W = [torch.randn(160, 256, generator=_drawn) for _ in range(3)]
ROW = torch.randn(1, 1, 256, generator=_drawn)


def project(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    return F.linear(x, a, c[:, 0]), x @ b.t(), F.linear(x.relu(), c)


def test_products_of_the_same_rows_become_one_call() -> None:
    gm, said = lowered(project, ROW, *W)
    assert calls(gm) == 2
    assert said[0].endswith("2 products of the same rows in one call") and "in one call" not in said[1]
    for ours, expected in zip(gm(ROW, *W), project(ROW, *W), strict=True):
        torch.testing.assert_close(ours, expected, rtol=RTOL[ours.dtype], atol=RTOL[ours.dtype])


def test_matrices_of_either_layout() -> None:
    def conv1d(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return torch.addmm(b, x, w), torch.mm(x, w)

    args = [t.bfloat16() for t in (ROW[0], W[0].t().contiguous(), W[0][:, 0].contiguous())]
    gm, _ = lowered(conv1d, *args)
    assert calls(gm) == 1
    for ours, expected in zip(gm(*args), conv1d(*args), strict=True):
        torch.testing.assert_close(ours, expected, rtol=RTOL[ours.dtype], atol=RTOL[ours.dtype])


def written_between(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    first = F.linear(x, a)
    x.add_(1.0)
    return first, F.linear(x, b)


def made_between(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    first = F.linear(x, a)
    return first, F.linear(x, b * first.mean())


@pytest.mark.parametrize("function", [written_between, made_between])
def test_what_is_not_the_same_yet_is_not_joined(function: Any) -> None:
    gm, said = lowered(function, ROW.clone(), *W[:2])
    assert calls(gm) == 2 and not any("in one call" in reason for reason in said)
    for ours, expected in zip(gm(ROW.clone(), *W[:2]), function(ROW.clone(), *W[:2]), strict=True):
        torch.testing.assert_close(ours, expected, rtol=RTOL[ours.dtype], atol=RTOL[ours.dtype])


def written_after(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """The rows of two products are a product themselves, and are written to between them."""
    rows = F.linear(x, a)
    first = F.linear(rows, b)
    rows.mul_(2.0)
    return first, F.linear(rows, b), rows


def nested(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    rows = F.linear(x, a)
    return F.linear(rows, b), F.linear(rows, b + 1.0), rows


@pytest.mark.parametrize(("function", "count"), [(nested, 3), (written_after, 3)])
def test_rows_may_be_a_product_themselves(function: Any, count: int) -> None:
    weights = W[0], W[1].t().contiguous()
    gm, _ = lowered(function, ROW, *weights)
    assert calls(gm) == count
    for ours, expected in zip(gm(ROW, *weights), function(ROW, *weights), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


def add_scaled(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(b[:1, :160], x[0], a.t(), beta=2.0)


def test_arguments_given_by_name_are_not_lost() -> None:
    graph = fx.Graph()
    x, a, b = (graph.placeholder(name) for name in "xab")
    node = graph.call_function(torch.ops.aten.linear.default, (x, a), {"bias": b})
    assert product_of(node) is None


@pytest.mark.parametrize(
    ("function", "inputs", "gradients"),
    [
        (lambda x, a: F.linear(x, a), (torch.randn(5, 256), W[0]), False),
        (lambda x, a: F.linear(x, a), (ROW, torch.randn(40, 256)), False),
        (lambda x, a: F.linear(x, a), (ROW.double(), W[0].double()), False),
        (lambda x, a: F.linear(x, a), (ROW, W[0]), True),
        (lambda x, a: torch.bmm(x, a.expand(1, -1, -1).mT), (ROW, W[0]), False),
        (add_scaled, (ROW, *W[:2]), False),
    ],
    ids=["five rows", "a small matrix", "float64", "gradients", "bmm", "beta"],
)
def test_other_products_stay(function: Any, inputs: tuple[Tensor, ...], gradients: bool) -> None:
    gm, said = lowered(function, *inputs, gradients=gradients)
    assert calls(gm) == 0 and said == []


def test_a_graph_in_which_nothing_was_rewritten_stays_as_it_is() -> None:
    with torch.no_grad():
        gm = capture(fx.symbolic_trace(project), (ROW, *W))
        before = str(gm.graph)
        assert lower(gm) == () and str(gm.graph) == before


class Block(nn.Module):
    """Attention of one token over given keys, and an MLP."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(256, 256, bias=bias) for _ in range(4))
        self.up, self.gate, self.down = nn.Linear(256, 512), nn.Linear(256, 512), nn.Linear(512, 256)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.view(len(x), 1, 8, 32).transpose(1, 2)

        k, v = torch.cat((keys, heads(self.k(x))), 2), torch.cat((values, heads(self.v(x))), 2)
        weights = (heads(self.q(x)) @ k.mT * 32**-0.5).softmax(-1)
        x = x + self.o((weights @ v).transpose(1, 2).reshape(len(x), 1, 256))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
def test_a_compiled_block_gives_what_eager_gives(dtype: torch.dtype, batch: int, bias: bool) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    block = Block(bias).to(dtype).eval()
    inputs = [torch.randn(batch, 1, 256).to(dtype), *(torch.randn(batch, 8, 90, 32).to(dtype) for _ in range(2))]
    exact = Block(bias).double().eval()
    exact.load_state_dict(block.state_dict())
    with torch.no_grad():
        expected = exact(*(x.double() for x in inputs))
        plain = (block(*inputs).double() - expected).abs().max()
        ours = (torch.compile(block, backend="latent", dynamic=False)(*inputs).double() - expected).abs().max()
    assert ours <= 2 * plain + 1e-6
    said = latent.reports().graphs[-1].lowered
    assert sum("weights are read as they lie" in line for line in said) == 4, "q k v, o, gate and up, down"
    assert any("3 products" in line for line in said)


def test_weights_of_a_subclass_multiply_on_their_own() -> None:
    two = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    block = Block(False).eval()
    inputs = torch.randn(1, 1, 256), torch.randn(1, 8, 90, 32), torch.randn(1, 8, 90, 32)
    torch.compiler.reset()
    with torch.no_grad():
        expected = block(*inputs)
        for linear in (block.q, block.o):
            weight = linear.weight.detach()
            linear.weight = nn.Parameter(two(weight, weight.clone()), requires_grad=False)
        made = torch.compile(block, backend="latent", dynamic=False)(*inputs)
    torch.testing.assert_close(made.a, expected, rtol=1e-4, atol=1e-5)
    said = [line for line in latent.reports().graphs[-1].lowered if line.startswith("aten::linear")]
    assert len(said) == 1 and "2 products" in said[0], "k and v; what comes after o is of the subclass too"


def test_kernels_are_printed_for_the_dump() -> None:
    gm, _ = lowered(project, ROW, *W)
    (first, _) = gm.graph.find_nodes(op="call_function", target=torch.ops.latent.gemv.default)
    (kernel,) = kernel_sources(gm.graph)[first.name]
    assert kernel.file == "gemv_f32_1.cpp" and "latent_gemv" in kernel.text


def test_a_number_of_rows_that_is_a_symbol_is_looked_at_in_each_call() -> None:
    """Few rows are the kernel's, more of them the library's, and none are no error: one compilation serves all."""
    torch.manual_seed(0)
    heads, seen = torch.randn(3, 96, 256).bfloat16(), []
    biased, plain = (nn.Linear(256, 300, bias).bfloat16().requires_grad_(False) for bias in (True, False))

    def project(x: Tensor) -> tuple[Tensor, ...]:
        return biased(x), plain(x)

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        captured = capture(gm, inputs)
        seen.append(len(list(join_products(captured.graph, gradients=False))))
        captured.recompile()
        return captured.forward

    torch._dynamo.reset()
    compiled = torch.compile(project, backend=backend, dynamic=True)
    for rows in (3, 2, 7, 4, 50):
        x = torch.randn(rows, 1, 256).bfloat16()
        for ours, expected in zip(compiled(x), project(x), strict=True):
            torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-2)
    assert seen == [1]
    for rows in (0, 2, 9):
        x = torch.randn(3, rows, 256).bfloat16()
        (made,) = torch.ops.latent.gemv(x, [heads], [None])
        torch.testing.assert_close(made, x @ heads.mT, rtol=2e-2, atol=2e-1)
