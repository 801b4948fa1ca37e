"""Models of images that are placed by position ids or lists of shapes, and what they refuse."""

import copy
import warnings
from typing import Any

import diffusers
import pytest
import stock
import tiny_edit_models as edit
import tiny_families as tiny
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import diffattn
from diffattn import DenseAttn, TokenGrid
from diffattn.grid import Reference
from diffattn.models import family_of

EXACT = {"atol": 1e-5, "rtol": 1e-4}
BY_IDS = [
    "flux", "flux-kontext", "flux.2", "flux.2-edit", "longcat-image-edit", "ovis-image", "bria",
    "bria-fibo", "chroma",
]  # fmt: skip


def grid_of(name: str, **changes: Any) -> TokenGrid:
    case = tiny.CASES[name]
    model = case.build()
    return family_of(model).grid(model, (), case.inputs() | changes)


def forward(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


class TestReferences:
    def test_in_the_targets_place_are_aligned(self) -> None:
        grid = grid_of("flux-kontext")
        assert (grid.frames, grid.height, grid.width, grid.text_before) == (1, 6, 9, 0)
        assert grid.references == (
            Reference(54, 1, 6, 9, aligned=True),
            Reference(108, 1, 4, 5, aligned=True),  # and may see references of its own size
        )

    def test_beside_the_targets_place_are_not(self) -> None:
        ids = edit.ids((0, 6, 9), (1, 6, 9), (2, 4, 5))
        ids[54:108, 2] += 9
        first, second = grid_of("flux-kontext", img_ids=ids).references
        assert (first.height, first.width, first.aligned) == (6, 9, False)
        assert second.aligned

    def test_in_other_steps_are_not(self) -> None:
        ids = edit.ids((0, 6, 9), (1, 6, 9), (2, 4, 5))
        ids[54:108, 1:] *= 0.5
        assert [r.aligned for r in grid_of("flux-kontext", img_ids=ids).references] == [False, True]

    @given(
        st.tuples(st.integers(1, 6), st.integers(1, 6)),
        st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=3),
    )
    @settings(deadline=None)
    def test_of_all_sizes(self, target: tuple[int, int], sizes: list[tuple[int, int]]) -> None:
        pictures = [(10.0 * n, *size) for n, size in enumerate([target, *sizes])]
        ids = edit.ids(*pictures)
        assume(len(ids) == 1 or {target, *sizes} != {(1, 1)})  # no token beside another
        grid = family_of(edit.flux()).grid(
            edit.flux(), (), {"hidden_states": torch.zeros(1, len(ids), 1), "img_ids": ids}
        )
        assert (grid.height, grid.width) == target
        assert [(r.height, r.width) for r in grid.references] == sizes
        assert all(r.aligned for r in grid.references)
        assert grid.tokens == len(ids)

    def test_before_the_target(self) -> None:
        ids = edit.ids((10, 4, 5), (0, 6, 9), more=(0.0,))
        grid = grid_of("flux.2", img_ids=ids, hidden_states=tiny.noise(1, 74, 16))
        assert (grid.text_before, grid.text_after, grid.height, grid.width) == (20, 0, 6, 9)
        assert grid.references == (Reference(0, 1, 4, 5),)
        assert grid.beside(before=7).references[0].start == 7

    def test_visualcloze_makes_the_last_row(self) -> None:
        """Its rows count from 1, and none is at time 0."""
        ids = edit.ids((1, 4, 5), (2, 4, 5), (3, 6, 9))
        grid = grid_of("flux", img_ids=ids, hidden_states=tiny.noise(1, 94, 16))
        assert (grid.height, grid.width, grid.text_before) == (6, 9, 40)
        assert [r.start for r in grid.references] == [0, 20]


class TestIdsWithoutPlaces:
    """diffusers' own tests of these models pass random ids."""

    @pytest.mark.parametrize("name", ["flux", "flux.2", "longcat-image", "bria", "chroma"])
    @pytest.mark.parametrize("ids", [torch.zeros(16, 4), tiny.noise(16, 4)], ids=["zeros", "noise"])
    def test_the_number_of_tokens_decides_for_a_square(self, name: str, ids: torch.Tensor) -> None:
        ids = ids if name == "flux.2" else ids[:, :3]
        case = tiny.CASES[name]
        inputs = case.inputs() | {"hidden_states": tiny.noise(2, 16, 16), "img_ids": ids.clone()}
        if "attention_mask" in inputs:
            inputs["attention_mask"] = inputs["attention_mask"][:, : 16 + edit.TEXT]
        model = case.build()
        want = forward(model, inputs)
        diffattn.set_attn_processor(model, DenseAttn())
        said = r"img_ids of .* place none of the 16 tokens beside another; .* 4 x 4 tokens"
        with pytest.warns(UserWarning, match=said):
            torch.testing.assert_close(forward(model, inputs), want, **EXACT)
        attached = diffattn.attach.attached_to(model)
        assert attached is not None
        assert attached.grid == TokenGrid(1, 4, 4)

    def test_otherwise_the_sizes_are_not_known(self) -> None:
        with pytest.raises(
            ValueError, match=r"of FluxTr.* 18 tokens are no square .* pass the time"
        ):
            grid_of("flux", img_ids=torch.zeros(18, 3), hidden_states=tiny.noise(1, 18, 16))


class TestIdsThatContradict:
    @pytest.mark.parametrize("name", BY_IDS)
    def test_the_number_of_tokens(self, name: str) -> None:
        inputs = tiny.CASES[name].inputs()
        ids, hidden = inputs["img_ids"], inputs["hidden_states"]
        tokens = hidden.shape[1]
        said = f"img_ids of .* place {tokens} tokens, but hidden_states has {tokens + 1}: the arg"
        with pytest.raises(ValueError, match=said):
            grid_of(name, hidden_states=torch.cat([hidden, hidden[:, :1]], 1))
        said = f"img_ids of .* place {tokens - 1} tokens, but hidden_states has {tokens}"
        with pytest.raises(ValueError, match=said):
            grid_of(name, img_ids=ids[..., 1:, :])

    @pytest.mark.parametrize("name", BY_IDS)
    def test_the_order_of_rows(self, name: str) -> None:
        ids = tiny.CASES[name].inputs()["img_ids"].clone()
        first = ids[..., :54, :]
        ids[..., :54, :] = first.flip(-2)
        with pytest.raises(ValueError, match=r"img_ids of .* must stand row by row, without gaps"):
            grid_of(name, img_ids=ids)

    def test_numbers_that_are_rounded(self) -> None:
        ids = edit.ids((0, 2, 300)).bfloat16()
        said = r"img_ids of FluxT.* are torch.bfloat16 and reach 300, .* as torch.float32"
        with pytest.raises(ValueError, match=said):
            grid_of("flux", img_ids=ids, hidden_states=tiny.noise(1, 600, 16))

    def test_krea_counts_its_text(self) -> None:
        ids = tiny.CASES["krea-2"].inputs()["position_ids"]
        said = "position_ids of Krea.* 60 tokens, but encoder_.* has 7 and hidden_states has 54"
        with pytest.raises(ValueError, match=said):
            grid_of("krea-2", position_ids=ids[1:])


class TestChroma:
    # Padding at the end, first, and among text that counts.
    SEEN = ([1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 1, 0, 0])

    def test_padding_stays_hidden(self) -> None:
        model, inputs = edit.chroma(), edit.chroma_inputs(*self.SEEN)
        case = tiny.CASES["chroma"]
        want = forward(model, inputs)
        changed = copy.deepcopy(inputs)
        changed["encoder_hidden_states"][1, 0] += 10.0
        torch.testing.assert_close(forward(model, changed), want, **EXACT)
        with stock.masked(model, list(case.sites), case.grid_of, stock.NEARBY):
            sparse = forward(model, inputs)
        diffattn.set_attn_processor(model, DenseAttn())
        torch.testing.assert_close(forward(model, inputs), want, **EXACT)
        diffattn.set_attn_processor(model, stock.NEARBY)
        torch.testing.assert_close(forward(model, inputs), sparse, **EXACT)
        torch.testing.assert_close(forward(model, changed), sparse, **EXACT)
        assert not torch.allclose(sparse, want, atol=1e-3)

    def test_compiled_code_hides_it_too(self) -> None:
        model, inputs = edit.chroma(), edit.chroma_inputs(*self.SEEN)
        diffattn.set_attn_processor(model, stock.NEARBY)
        want = forward(model, inputs)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(forward(compiled, inputs), want, **EXACT)
        torch._dynamo.reset()

    def test_a_mask_of_numbers_is_refused_with_the_remedy(self) -> None:
        """The pipelines of diffusers 0.42 make one, which hides nothing (their issue 12116)."""
        model, inputs = edit.chroma(), edit.chroma_inputs(*self.SEEN)
        diffattn.set_attn_processor(model, stock.NEARBY)
        said = r"torch.float32 \(2, 1, 61, 61\): .* as prompt_attention_mask=mask.bool\(\)"
        with pytest.raises(ValueError, match=said):
            forward(model, inputs | {"attention_mask": inputs["attention_mask"].float()})


class TestFlux3:
    def test_blocks_for_one_kind_of_tokens_have_grids_of_their_own(self) -> None:
        recorder = stock.Recording()
        model = edit.flux3()
        diffattn.set_attn_processor(model, recorder)
        forward(model, edit.flux3_inputs())
        grids = [site.grid for site, _ in recorder.calls]
        alone, references, joint, _ = grids
        assert alone == TokenGrid(1, 6, 9)
        assert references.references == (Reference(54, 1, 4, 5),)
        assert (references.height, references.width, references.tokens) == (6, 9, 74)
        assert joint == grid_of("flux.3-edit").beside(before=edit.TEXT)

    def test_without_references_their_blocks_are_not_missed(self) -> None:
        model, inputs = edit.flux3(), edit.flux3_inputs(references=False)
        want = forward(model, inputs)
        attachment = diffattn.set_attn_processor(model, DenseAttn())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(forward(model, inputs), want, **EXACT)
        assert (attachment.sites, attachment.sparse_calls) == (4, 3)
        copied = copy.deepcopy(model)
        torch.testing.assert_close(forward(copied, inputs), want, **EXACT)
        assert diffattn.attach.attached_to(copied).groups[0].part is not None

    def test_compiled(self) -> None:
        model, inputs = edit.flux3(), edit.flux3_inputs()
        diffattn.set_attn_processor(model, stock.NEARBY)
        want = forward(model, inputs)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(forward(compiled, inputs), want, **EXACT)
        torch._dynamo.reset()

    def test_ids_of_references_that_contradict(self) -> None:
        ids = edit.flux3_inputs()["image_cond_ids"]
        said = "image_cond_ids of Flux3.* place 73 tokens, but image_cond_hidden_states has 74"
        with pytest.raises(ValueError, match=said):
            grid_of("flux.3-edit", image_cond_ids=ids[1:])


class TestFibo2:
    @pytest.mark.parametrize(
        ("lengths", "before", "after"),
        [
            ((), 8, 0),
            ((16, 16), 8, 0),
            ((4, 4), 4, 0),
            ((3, 1), 4, 0),  # of unequal prompts with as many gist tokens
            ((16, 4), 0, 8),
            ((4, 9), 0, 8),
        ],
    )
    def test_gist_tokens_stand_last_where_they_are_padded(
        self, lengths: tuple[int, ...], before: int, after: int
    ) -> None:
        inputs = edit.fibo2_inputs(*lengths)
        model = edit.bria_fibo2()
        grid = family_of(model).grid(model, (), inputs)
        assert (grid.text_before, grid.text_after) == (before, 54 + 20 + after)
        assert [r.start for r in grid.references] == [before + 54, before + 108]
        recorder = stock.Recording()
        diffattn.set_attn_processor(model, recorder)
        forward(model, inputs)
        refiner, *layers = [site.grid for site, _ in recorder.calls]
        assert layers == [grid, grid]
        assert refiner == tiny.CASES["bria-fibo-2"].grids[0]

    def test_plans_know_its_heads(self) -> None:
        model = edit.bria_fibo2()
        got = diffattn.plan(model, DenseAttn(), grid=grid_of("bria-fibo-2"))
        assert (got.heads, got.head_dim, got.layers, got.tokens) == (2, 16, 2, 136)


class TestIdsOfPipelines:
    """Ids that the functions of diffusers' own pipelines write."""

    def test_flux_kontext(self) -> None:
        write = diffusers.FluxKontextPipeline._prepare_latent_image_ids
        target, reference = (write(1, h, w, "cpu", torch.bfloat16) for h, w in ((6, 9), (200, 9)))
        reference[:, 0] = 1
        tokens = tiny.noise(1, 54 + 1800, 1)
        grid = grid_of("flux", img_ids=torch.cat([target, reference]), hidden_states=tokens)
        assert grid == edit.pictures((200, 9))

    def test_flux2(self) -> None:
        pipe = diffusers.Flux2Pipeline
        target = pipe._prepare_latent_ids(torch.zeros(2, 8, 6, 9))
        references = pipe._prepare_image_ids([torch.zeros(1, 8, h, w) for h, w in ((6, 9), (4, 5))])
        ids = torch.cat([target, references.expand(2, -1, -1)], 1)
        grid = grid_of("flux.2", img_ids=ids, hidden_states=tiny.noise(2, ids.shape[1], 1))
        assert grid == edit.pictures((6, 9), (4, 5))

    def test_flux3(self) -> None:
        module = pytest.importorskip("diffusers.modular_pipelines.flux3.before_denoise")
        write = module._prepare_image_ids
        for scale in (1.0, 0.37, 1 / 3):
            grid = grid_of(
                "flux.3-edit",
                img_ids=write(6, 9, scale),
                image_cond_ids=torch.cat([write(6, 9, scale, -1), write(4, 5, scale, -2)]),
            )
            assert grid == edit.pictures((6, 9), (4, 5))

    def test_longcat(self) -> None:
        module = pytest.importorskip("diffusers.pipelines.longcat_image.pipeline_longcat_image")

        def write(number: int, height: int, width: int) -> torch.Tensor:
            return module.prepare_pos_ids(
                number, type="image", start=(512, 512), height=height, width=width
            )

        ids = torch.cat([write(1, 6, 9), write(2, 4, 5)])
        grid = grid_of("longcat-image", img_ids=ids, hidden_states=tiny.noise(1, 74, 1))
        assert grid == edit.pictures((4, 5))

    def test_krea(self) -> None:
        pipe = getattr(diffusers, "Krea2Pipeline", None)
        if pipe is None:
            pytest.skip(f"diffusers {diffusers.__version__} has no Krea 2")
        ids = pipe.prepare_position_ids(edit.TEXT, 6, 9, "cpu")
        assert grid_of("krea-2", position_ids=ids) == edit.pictures()


class TestQwen:
    def test_layers_are_frames_of_one_grid(self) -> None:
        grid = grid_of("qwen-image-layered")
        assert (grid.frames, grid.height, grid.width) == (3, 6, 9)
        assert grid.references == (Reference(162, 1, 4, 5),)

    def test_a_single_image_of_the_model_for_layers(self) -> None:
        grid = grid_of(
            "qwen-image-layered", img_shapes=[[(1, 6, 9)]] * 2, hidden_states=tiny.noise(2, 54, 16)
        )
        assert grid == TokenGrid(1, 6, 9)

    def test_layers_of_several_sizes_are_refused(self) -> None:
        shapes = [(1, 6, 9), (1, 4, 5), (1, 6, 9)]
        with pytest.raises(
            ValueError, match=r"layers of .* several sizes, \(1, 6, 9\), \(1, 4, 5\)"
        ):
            grid_of("qwen-image-layered", img_shapes=[shapes], hidden_states=tiny.noise(1, 128, 16))

    @pytest.mark.parametrize("shapes", [[(1, 6, 9), (1, 6, 9)], [(1, 6, 8)]], ids=str)
    def test_shapes_that_contradict_the_tokens(self, shapes: list[tuple[int, int, int]]) -> None:
        tokens = sum(t * h * w for t, h, w in shapes)
        said = f"img_shapes of .* are 1x6x.*, which make {tokens} tokens, but hidden_states has 54"
        with pytest.raises(ValueError, match=said):
            grid_of("qwen-image", img_shapes=[shapes] * 2)
