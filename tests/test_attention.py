"""attention(): masks and layouts in, the right backend, clear errors."""

import logging
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from triton_device import triton_device

from diffattn import (
    BlockLayout,
    FullMask,
    PredicateMask,
    RadialAttn,
    TokenGrid,
    attention,
    from_block_mask,
)
from diffattn.kernels.reference import reference_attention
from diffattn.operator import (
    BACKEND_VARIABLE,
    BACKENDS,
    Backend,
    _log_choice,
    attention_gradients,
    choose_backend,
    every_pair,
    merged,
)

GRID = TokenGrid(5, 4, 7, text_after=3)


def inputs(
    batch: int = 2, heads: int = 3, head_dim: int = 16, grid: TokenGrid = GRID
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (3, batch, grid.tokens, heads, head_dim)
    return tuple(torch.randn(shape, generator=generator).unbind(0))


MASKS = {
    "full": FullMask(GRID),
    "radial": RadialAttn(block_size=16).mask(GRID),
    "paper": RadialAttn(rule="paper").mask(GRID),
    "causal and near": PredicateMask(GRID, lambda q, k: k <= q)
    & PredicateMask(GRID, lambda q, k: (q - k).abs() < 20),
    "some rows empty": PredicateMask(GRID, lambda q, k: (q % 3 == 1) & (k < 40)),
}


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("name", MASKS)
def test_attention_is_dense_attention_under_the_mask(name: str, backend: str | None) -> None:
    q, k, v = inputs()
    want, want_lse = reference_attention(q, k, v, MASKS[name].dense())
    out, lse = attention(q, k, v, MASKS[name], return_lse=True, backend=backend)
    torch.testing.assert_close(out.double(), want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)
    layout = MASKS[name].blocks(32, 16)
    torch.testing.assert_close(attention(q, k, v, layout, backend=backend), out)


@pytest.mark.parametrize("name", MASKS)
def test_gradients(name: str) -> None:
    leaves = [x.requires_grad_() for x in inputs()]
    weight = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(1))
    (attention(*leaves, MASKS[name]) * weight).sum().backward()
    got = [x.grad.clone() for x in leaves]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    out, _ = reference_attention(*exact, MASKS[name].dense())
    (out * weight).sum().backward()
    for mine, truth in zip(got, exact, strict=True):
        torch.testing.assert_close(mine.double(), truth.grad, atol=1e-5, rtol=1e-4)


def test_no_mask_is_dense() -> None:
    q, k, v = inputs()
    torch.testing.assert_close(attention(q, k, v), attention(q, k, v, FullMask(GRID)))


@pytest.mark.parametrize("mask", [None, MASKS["radial"]], ids=["dense", "sparse"])
def test_padded_keys_are_hidden(mask: object) -> None:
    q, k, v = inputs()
    key_mask = torch.rand(2, GRID.tokens, generator=torch.Generator().manual_seed(2)) < 0.6
    dense = None if mask is None else mask.dense()
    want, _ = reference_attention(q, k, v, dense, key_mask=key_mask)
    out = attention(q, k, v, mask, key_mask=key_mask)
    torch.testing.assert_close(out.double(), want, atol=1e-6, rtol=1e-5)


def test_a_sample_whose_keys_are_all_padding_gives_zeros() -> None:
    q, k, v = inputs()
    key_mask = torch.tensor([[True], [False]]).expand(2, GRID.tokens)
    for mask in (None, MASKS["radial"]):
        out = attention(q, k, v, mask, key_mask=key_mask)
        assert not out[1].any()
        assert out[0].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attentions_over_different_keys_merge(dtype: torch.dtype) -> None:
    """Queries of sample 0 see no key of the first half, of sample 1 no key at all."""
    torch.manual_seed(0)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 3, 20, 2, 8, dtype=dtype))
    there = torch.ones(3, 20, dtype=torch.bool)
    there[0, :11] = False
    there[1] = False
    parts = []
    for some in (slice(0, 11), slice(11, 20)):
        layout = every_pair(20, some.stop - some.start, q.device)
        out, lse = attention(
            q, k[:, some], v[:, some], layout, key_mask=there[:, some], return_lse=True
        )
        parts += [out, lse]
    out, lse = merged(*parts)
    assert out.dtype == dtype
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    # The reference gives 0 and -inf where a query sees nothing.
    want, want_lse = attention(
        *leaves, FullMask(TokenGrid(1, 4, 5)), key_mask=there, return_lse=True, backend="reference"
    )
    close = (
        {"atol": 0.03, "rtol": 0.03} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    )
    torch.testing.assert_close(out.double(), want, **close)
    torch.testing.assert_close(lse.double(), want_lse, **close)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    along, of_lse = torch.randn_like(out), torch.randn_like(lse)
    seen = lse.isfinite()
    found = torch.autograd.grad(
        (out * along).sum() + (lse[seen] * of_lse[seen]).sum(), (q, k, v), retain_graph=True
    )
    expected = torch.autograd.grad(
        (want * along).sum() + (want_lse[seen] * of_lse[seen]).sum(), leaves
    )
    for got, right in zip(found, expected, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got.double(), right, **close)
    # Where both see a key, the guard for queries that see nothing changes no bit.
    share = (parts[3] - parts[1]).sigmoid().transpose(1, 2)[..., None]
    plain = torch.lerp(parts[0], parts[2], share.to(dtype))
    assert torch.equal(out[2], plain[2])


def layout_by_head() -> BlockLayout:
    """Another mask for each sample and head, with empty, partial and full blocks and empty rows."""
    reach = torch.tensor([[9, 70, 150], [0, 30, 2]])
    block_mask = create_block_mask(
        lambda b, h, q, k: ((q - k).abs() < reach[b, h]) & (k < 120),
        *(2, 3, GRID.tokens, GRID.tokens),
        device="cpu",
        BLOCK_SIZE=32,
    )
    return from_block_mask(block_mask)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles with g++ on the CPU")
def test_flex_is_the_same_attention() -> None:
    # One layout only: compiling takes 20 seconds where Inductor's cache does not know it.
    q, k, v = inputs()
    layout = layout_by_head()
    assert layout.full_blocks
    assert layout.partial_blocks
    want, _ = reference_attention(q, k, v, layout.dense())
    # Parameters may require gradients where none are recorded.
    with torch.no_grad():
        out = attention(q.requires_grad_(), k, v, layout, backend="flex")
    torch.testing.assert_close(out.double(), want.detach(), atol=1e-6, rtol=1e-5)
    assert out.is_contiguous()


@pytest.mark.gpu
def test_flex_trains_on_a_gpu() -> None:
    q, k, v = (x.to("cuda").requires_grad_() for x in inputs())
    mask = PredicateMask(GRID, lambda q, k: ((q - k).abs() < 40) & (k < 120) & (q != 7))
    layout = mask.blocks(128, device="cuda")
    for key_mask in (None, torch.rand(2, GRID.tokens, device="cuda") < 0.6):
        out, lse = attention(q, k, v, layout, key_mask=key_mask, return_lse=True, backend="flex")
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        want, want_lse = reference_attention(*exact, layout.dense(), key_mask=key_mask)
        # Its products may be in TF32.
        torch.testing.assert_close(out.double(), want, atol=5e-3, rtol=5e-3)
        torch.testing.assert_close(lse.double(), want_lse, atol=5e-3, rtol=5e-3)
        weight = torch.randn_like(out)
        wanted = torch.autograd.grad(want, exact, weight.double())
        by_autograd = torch.autograd.grad(out, (q, k, v), weight)
        named = attention_gradients(
            weight, q, k, v, out, lse, layout, key_mask=key_mask, backend="flex"
        )
        for truth, one, other in zip(wanted, by_autograd, named, strict=True):
            torch.testing.assert_close(one.double(), truth, atol=2e-2, rtol=2e-2)
            torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)


def test_flex_never_runs_uncompiled() -> None:
    q, k, v = inputs()
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(RuntimeError, match=r"'flex' needs torch.compile, which is switched off"),
    ):
        attention(q, k, v, MASKS["radial"], backend="flex")


def test_flex_says_what_it_cannot_do_on_the_cpu() -> None:
    q, k, v = inputs()
    with pytest.raises(NotImplementedError, match="'flex' has no log-sum-exp on the CPU; leave"):
        attention(q, k, v, MASKS["radial"], backend="flex", return_lse=True)
    with pytest.raises(NotImplementedError, match="'flex' has no gradients on the CPU; leave"):
        attention(q, k, v.requires_grad_(), MASKS["radial"], backend="flex")
    with pytest.raises(
        ValueError, match=r"'flex' computes in torch.float32, .*, not torch.float64"
    ):
        attention(q.double(), k.double(), v.double(), MASKS["radial"], backend="flex")


def test_triton_is_the_same_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    device = triton_device(monkeypatch)
    q, k, v = (x.to(device).requires_grad_() for x in inputs())
    layout = layout_by_head().to(device)
    key_mask = torch.ones(2, GRID.tokens, dtype=torch.bool, device=device)
    key_mask[1, 30:60] = False
    how = {"key_mask": key_mask, "scale": 0.2}
    out, lse = attention(q, k, v, layout, return_lse=True, backend="triton", **how)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want, want_lse = reference_attention(*exact, layout.dense(), **how)
    torch.testing.assert_close(out.double(), want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device)
    wanted = torch.autograd.grad(want, exact, weight.double())
    by_autograd = torch.autograd.grad(out, (q, k, v), weight)
    named = attention_gradients(weight, q, k, v, out, lse, layout, backend="triton", **how)
    for truth, one, other in zip(wanted, by_autograd, named, strict=True):
        torch.testing.assert_close(one.double(), truth, atol=1e-5, rtol=1e-4)
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_by_name(backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in inputs())
    layout = layout_by_head()
    out, lse = attention(q, k, v, layout, return_lse=True, backend=backend)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(out, (q, k, v), weight)
    found = attention_gradients(weight, q, k, v, out, lse, layout, backend=backend)
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(one, other)


def test_each_device_has_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    chosen = {device: choose_backend(torch.device(device)) for device in ("cpu", "cuda:1", "xpu")}
    assert chosen == {"cpu": "cpu", "cuda:1": "triton", "xpu": "triton"}  # ROCm is "cuda", too
    assert choose_backend(torch.device("cuda"), "flex") == "flex"
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    assert choose_backend(torch.device("cuda")) == "reference"
    assert choose_backend(torch.device("cpu"), "cpu") == "cpu"


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_gradients_come_from_the_backend_that_was_chosen(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ChosenError(Exception):
        pass

    def chosen(*arguments: object) -> None:
        raise ChosenError

    q, k, v = inputs()
    layout = MASKS["full"].blocks()
    monkeypatch.setitem(BACKENDS, backend, Backend(forward=chosen, gradients=chosen))
    monkeypatch.setenv(BACKEND_VARIABLE, backend)
    with pytest.raises(ChosenError):
        attention(q, k, v, layout)
    with pytest.raises(ChosenError):
        attention_gradients(q, q, k, v, q, q, layout)


def test_the_choice_is_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    _log_choice.cache_clear()
    q, k, v = inputs()
    with caplog.at_level(logging.DEBUG, "diffattn.operator"):
        for backend in (None, "cpu", "reference"):
            attention(q, k, v, MASKS["full"], backend=backend)
    assert [record.getMessage() for record in caplog.records] == [
        "attention on cpu is computed by backend 'cpu'",
        "attention on cpu is computed by backend 'reference'",
    ]


def test_the_environment_chooses_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs()
    monkeypatch.setenv(BACKEND_VARIABLE, "nonsense")
    message = "unknown backend 'nonsense'; choose from triton, cpu, flex, reference"
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, MASKS["full"])
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    out = attention(q, k, v, MASKS["full"])
    want, _ = reference_attention(q, k, v, None)
    assert torch.equal(out, want.float())


def test_other_devices_say_what_is_missing() -> None:
    q, k, v = (x.to("meta") for x in inputs())
    message = r"are on meta, and there are sparse kernels for cuda, xpu, cpu only; .*backend='flex'"
    with pytest.raises(NotImplementedError, match=message):
        attention(q, k, v, MASKS["full"])


def test_a_missing_triton_is_an_error_only_where_it_is_needed() -> None:
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, diffattn
mask = diffattn.FullMask(diffattn.TokenGrid(1, 4, 5))
q = torch.randn(1, 20, 2, 8)
print(tuple(diffattn.attention(q, q, q, mask).shape))
try:
    diffattn.attention(q, q, q, mask, backend="triton")
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    shape, message = done.stdout.splitlines()
    assert shape == "(1, 20, 2, 8)"
    assert message.startswith("backend 'triton' needs Triton, which cannot be imported (import of")
    assert message.endswith(
        "install it with 'pip install triton', or pass backend='flex', or run the pipeline on the"
        " CPU"
    )


def test_kernels_of_the_other_device_are_refused() -> None:
    q, k, v = (x.to("meta") for x in inputs())
    layout = MASKS["full"].blocks().to("meta")
    with pytest.raises(ValueError, match="this is the CPU path, but q is on meta"):
        attention(q, k, v, layout, backend="cpu")


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (np.zeros((2, 143, 3, 16), np.float32), "a numpy.ndarray"),
        ([[1.0]], "a list"),
        (None, "None"),
        ("query", "a str"),
    ],
)
def test_what_is_no_tensor_is_a_type_error_with_its_name(wrong: Any, kind: str) -> None:
    q, k, v = inputs()
    mask = MASKS["full"]
    shape = r"but must be a torch.Tensor of shape \(batch, tokens, heads, head_dim\)"
    for name, arguments in (
        ("query", (wrong, k, v)),
        ("key", (q, wrong, v)),
        ("value", (q, k, wrong)),
        ("query", (wrong, wrong, wrong)),
    ):
        for given in (None, mask):
            with pytest.raises(TypeError, match=f"^{name} is {kind}, {shape}$"):
                attention(*arguments, given)
    if wrong is None:
        return
    with pytest.raises(TypeError, match=f"^key_mask is {kind}, but must be a bool torch.Tensor"):
        attention(q, k, v, mask, key_mask=wrong)
    with pytest.raises(TypeError, match=f"^order is {kind}, but must be a TileOrder or None$"):
        attention(q, k, v, mask, order=wrong)


def test_errors_say_what_is_wrong() -> None:
    q, k, v = inputs()
    layout: BlockLayout = MASKS["full"].blocks(16)
    for arguments, message in [
        ((q[0], k, v, layout), r"query has shape \(143, 3, 16\), but must be \(batch, tokens"),
        ((q, k, v[:, 1:], layout), "do not fit: batch and heads must be equal"),
        ((q, k[:, :, :2], v[:, :, :2], layout), "do not fit: batch and heads must be equal"),
        ((q, k[..., :8], v[..., :8], layout), "head_dim is 16 in query and 8 in key"),
        ((q[:, 1:], k[:, 1:], v[:, 1:], layout), "over 143 x 143 tokens, but .* have 142 and 142"),
        ((q, k, v, layout.to("meta")), "blocks are on meta and the query on cpu"),
        (
            (q, k, v.half(), layout),
            "query is torch.float32, key torch.float32 and value torch.float16",
        ),
        ((q.int(), k.int(), v.int(), layout), "query is torch.int32, .* one floating-point dtype"),
        ((q, k.to("meta"), v, layout), "key is on meta and the query on cpu; move it there"),
        ((q, k, v.to("meta"), None), "value is on meta and the query on cpu; move it there"),
        ((q[:, :, :2], k[:, :, :2], v[:, :, :2], layout_by_head()), "of 3 heads, but .* has 2"),
        ((q[:1], k[:1], v[:1], layout_by_head()), "the mask is one of 2 samples, but .* has 1"),
        ((q, k, v, "radial"), "mask is a str, but must be an AttentionMask or a BlockLayout"),
    ]:
        with pytest.raises(ValueError, match=message):
            attention(*arguments)
    with pytest.raises(ValueError, match=r"key_mask is torch.float32 \(2, 143\), but must be bool"):
        attention(q, k, v, layout, key_mask=torch.ones(2, 143))
    with pytest.raises(ValueError, match="key_mask is on meta and the query on cpu; move it there"):
        attention(q, k, v, layout, key_mask=torch.ones(2, 143, dtype=torch.bool, device="meta"))
    with pytest.raises(ValueError, match="return_lse needs a mask"):
        attention(q, k, v, return_lse=True)
