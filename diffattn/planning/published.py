"""Published models: their shapes, so that planning needs neither files nor network.

The figures come from the models' own configuration files and pipelines.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

from diffattn.grid import TokenGrid
from diffattn.models.base import SizeRules


@dataclass(frozen=True)
class LinearWork:
    """FLOPs of one block outside self-attention: projections, feed-forward, cross-attention.

    Attributes:
        per_token: FLOPs for each token of the sequence.
        per_call: FLOPs that do not depend on the sequence: the cross-attention's keys and values.
    """

    per_token: int
    per_call: int = 0

    @classmethod
    def joint(cls, channels: int) -> LinearWork:
        """Blocks in which text is part of the sequence, with a feed-forward of 4 x channels."""
        return cls(24 * channels**2)

    @classmethod
    def apart(cls, channels: int, feed_forward: int, context: int) -> LinearWork:
        """Blocks with cross-attention to a text of `context` tokens, which counts as linear work.

        Self-attention has four projections, cross-attention two for the video and two for the text.
        """
        attends = 4 * context * channels
        return cls(12 * channels**2 + 4 * channels * feed_forward + attends, attends * channels)


@dataclass(frozen=True)
class Sound:
    """Sound in the same sequence as the video, as long as the video.

    Attributes:
        latents_per_second, frames_per_second: rates of the sound's tokens and of the video.
        channels: each has tokens of its own.
    """

    latents_per_second: int
    frames_per_second: int
    channels: int

    def tokens(self, num_frames: int) -> int:
        """Tokens beside a video of so many frames."""
        return self.channels * round(num_frames * self.latents_per_second / self.frames_per_second)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The figures of a model that planning needs.

    Attributes:
        name: repository id or folder of the model, for messages.
        variant: the model's name in the methods' tables of recommended settings.
        heads, head_dim: number of self-attention heads, and their dimension.
        block_of_site: index of the transformer block that each attention site lies in.
        sizes: pixels and frames that the model can make, and the tokens they become; None where
            that is not known, as of a denoiser without its pipeline.
        text_before, text_after: text tokens in the sequence; None where the prompt decides.
        sound: sound between the text and the video; None for none.
        linear: work outside self-attention; None where it is not known.
        height, width, num_frames, steps: defaults of the pipeline; None where they are not known.
    """

    name: str
    variant: str
    heads: int
    head_dim: int
    block_of_site: tuple[int, ...]
    sizes: SizeRules | None
    text_before: int | None = 0
    text_after: int | None = 0
    sound: Sound | None = None
    linear: LinearWork | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    steps: int | None = None

    @property
    def family(self) -> str:
        """Name of the model's family in `diffattn.models.FAMILIES`; "" for no model."""
        return "wan" if self.variant.startswith("wan2.") else self.variant

    def linear_flops(self, tokens: int) -> int | None:
        """FLOPs of one forward outside self-attention; None where they are not known."""
        if self.linear is None:
            return None
        blocks = len(set(self.block_of_site))
        return (self.linear.per_token * tokens + self.linear.per_call) * blocks

    def grid(
        self, height: int | None, width: int | None, num_frames: int | None, text: int | None
    ) -> TokenGrid:
        """The tokens of a call.

        Args:
            height, width: pixels; the model's default when None.
            num_frames: frames of the video; the model's default when None.
            text: text tokens in the sequence; the length that prompts are padded to when None.

        Raises:
            ValueError: if the model cannot make that size (the message names the nearest sizes), or
                a size or the number of text tokens is missing.
        """
        if self.sizes is None:
            raise ValueError(
                f"{self.name} alone does not say how many tokens pixels become: give grid, the"
                f" tokens of a call, or pass its pipeline"
            )
        given = {"height": height, "width": width, "num_frames": num_frames}
        sizes = {n: getattr(self, n) if value is None else value for n, value in given.items()}
        if sizes["num_frames"] is None and self.sizes.frame_stride == 0:
            sizes["num_frames"] = 1
        missing = [name for name, value in sizes.items() if value is None]
        if missing:
            raise ValueError(f"the sizes {self.name} makes are not known: give {_and(missing)}")
        before, after = self._text(text)
        video = self.sizes.grid(**sizes)
        if self.sound is not None:
            before += self.sound.tokens(sizes["num_frames"])
        return video.beside(before, after)

    def _text(self, text: int | None) -> tuple[int, int]:
        """Numbers of text tokens before and after the video."""
        sides = {"text_before": self.text_before, "text_after": self.text_after}
        holds_text = [side for side, tokens in sides.items() if tokens != 0]
        if not holds_text:
            if text:
                raise ValueError(
                    f"text is {text}, but the sequence of {self.name} holds video tokens only:"
                    f" its text is apart"
                )
            return 0, 0
        side = holds_text[0]
        tokens = sides[side] if text is None else text
        if tokens is None:
            raise ValueError(
                f"the sequence of {self.name} holds text too, and how much depends on the prompt:"
                f" give text, its number of tokens"
            )
        return (tokens, 0) if side == "text_before" else (0, tokens)


def _and(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _wan(
    name: str,
    size: tuple[int, int, int],
    *,
    heads: int,
    layers: int,
    feed_forward: int,
    variant: str = "wan2.1",
    token_pixels: int = 16,
    context: int = 512,
    steps: int = 50,
) -> ModelShape:
    height, width, num_frames = size
    return ModelShape(
        name=name,
        variant=variant,
        heads=heads,
        head_dim=128,
        block_of_site=tuple(range(layers)),
        sizes=SizeRules(token_pixels, frame_stride=4, frame_offset=1),
        linear=LinearWork.apart(heads * 128, feed_forward, context),
        height=height,
        width=width,
        num_frames=num_frames,
        steps=steps,
    )


_wan_14b = partial(_wan, heads=40, layers=40, feed_forward=13824)
_wan_22_14b = partial(_wan_14b, variant="wan2.2", steps=40)


def _joint(
    name: str,
    variant: str,
    size: tuple[int, int, int],
    sizes: SizeRules,
    *,
    heads: int,
    head_dim: int,
    layers: int,
    steps: int,
    text_before: int | None = 0,
    text_after: int | None = 0,
    linear: int = 24,
) -> ModelShape:
    """A model with text in its sequence; `linear`: FLOPs of a token, in channels squared."""
    height, width, num_frames = size
    return ModelShape(
        name=name,
        variant=variant,
        heads=heads,
        head_dim=head_dim,
        block_of_site=tuple(range(layers)),
        sizes=sizes,
        text_before=text_before,
        text_after=text_after,
        linear=LinearWork(linear * (heads * head_dim) ** 2),
        height=height,
        width=width,
        num_frames=num_frames,
        steps=steps,
    )


_cogvideox = partial(
    _joint, variant="cogvideox", size=(480, 720, 49),
    sizes=SizeRules(16, frame_stride=4, frame_offset=1),
    head_dim=64, text_before=226, steps=50,
)  # fmt: skip
_image = partial(
    _joint, size=(1024, 1024, 1), sizes=SizeRules.images(16), head_dim=128, text_before=512,
)  # fmt: skip
_flux = partial(_image, variant="flux", heads=24, layers=57)
# Gated feed-forwards of 3 x the channels.
_flux2 = partial(_image, variant="flux.2", linear=26)
# Prompts are not padded: the text tokens are those of the prompt, and of the images in it.
_qwen = partial(
    _image, variant="qwen-image", heads=24, layers=60, text_before=None, steps=50,
)  # fmt: skip
_longcat = partial(_image, variant="longcat-image", heads=24, layers=30, steps=50)
# Keys and values of a quarter of the heads, a gate, and a gated feed-forward of 16384.
_krea2 = partial(_image, variant="krea-2", heads=48, layers=28, linear=23)
# Prompts are padded to a multiple of 32 tokens. The gated feed-forward is 8/3 x the channels.
_z_image = partial(
    _image, variant="z-image", heads=30, layers=30, text_before=0, text_after=None,
)  # fmt: skip
# Prompts are padded to 1000 tokens, and the text to draw to 128.
_hunyuan_image = partial(
    _joint, variant="hunyuan-image", size=(2048, 2048, 1), sizes=SizeRules.images(32),
    heads=28, head_dim=128, layers=60, text_after=1000 + 128,
)  # fmt: skip
_hunyuanvideo = partial(
    _joint, variant="hunyuanvideo", size=(720, 1280, 129),
    sizes=SizeRules(16, frame_stride=4, frame_offset=1),
    heads=24, head_dim=128, layers=60, text_after=256, steps=50,
)  # fmt: skip
_sd3 = partial(
    _joint, variant="sd3", size=(1024, 1024, 1), sizes=SizeRules.images(16),
    head_dim=64, text_after=333, steps=28,
)  # fmt: skip


def _cosmos(
    name: str, size: tuple[int, int, int], *, heads: int, layers: int, steps: int, stride: int = 4
) -> ModelShape:
    height, width, num_frames = size
    channels, context, of_text = heads * 128, 512, 1024
    apart = LinearWork.apart(channels, 4 * channels, context)
    return ModelShape(
        name=name,
        variant="cosmos",
        heads=heads,
        head_dim=128,
        block_of_site=tuple(range(layers)),
        sizes=SizeRules(16, frame_stride=stride, frame_offset=1),
        # Keys and values of the text come from its own channels.
        linear=LinearWork(apart.per_token, 4 * context * of_text * channels),
        height=height,
        width=width,
        num_frames=num_frames,
        steps=steps,
    )


_cosmos1 = partial(_cosmos, size=(704, 1280, 121), steps=36, stride=8)
_cosmos2 = partial(_cosmos, size=(704, 1280, 93), steps=35)
_cosmos2_image = partial(_cosmos, size=(768, 1360, 1), steps=35)

_480P, _720P = (480, 832, 81), (720, 1280, 81)
_WITH_IMAGE = 512 + 257  # the context of image-to-video: text, and CLIP's tokens of the image

_SHAPES: tuple[ModelShape, ...] = (
    _wan("Wan-AI/Wan2.1-T2V-1.3B", _480P, heads=12, layers=30, feed_forward=8960),
    _wan_14b("Wan-AI/Wan2.1-T2V-14B", _720P),
    _wan_14b("Wan-AI/Wan2.1-I2V-14B-480P", _480P, context=_WITH_IMAGE),
    _wan_14b("Wan-AI/Wan2.1-I2V-14B-720P", _720P, context=_WITH_IMAGE),
    _wan_22_14b("Wan-AI/Wan2.2-T2V-A14B", _720P),
    _wan_22_14b("Wan-AI/Wan2.2-I2V-A14B", _720P),
    _wan(
        "Wan-AI/Wan2.2-TI2V-5B", (704, 1280, 121), variant="wan2.2-5b", token_pixels=32,
        heads=24, layers=30, feed_forward=14336,
    ),
    _wan_14b("Skywork/SkyReels-V2-T2V-14B-720P", (720, 1280, 121), variant="skyreels-v2"),
    _hunyuanvideo("hunyuanvideo-community/HunyuanVideo"),
    _hunyuanvideo("tencent/HunyuanVideo"),
    _joint(
        "genmo/mochi-1-preview", variant="mochi", size=(480, 848, 163),
        sizes=SizeRules(16, frame_stride=6, frame_offset=1),
        heads=24, head_dim=128, layers=48, text_after=256, steps=64,
    ),
    _cogvideox("zai-org/CogVideoX-2b", heads=30, layers=30),
    _cogvideox("zai-org/CogVideoX-5b", heads=48, layers=42),
    _cogvideox(
        "zai-org/CogVideoX1.5-5B", size=(768, 1360, 81),
        sizes=SizeRules(16, frame_stride=4, frame_offset=1, frames_per_token=2),
        heads=48, layers=42,
    ),
    ModelShape(
        name="Lightricks/LTX-Video", variant="ltx",
        heads=32, head_dim=64, block_of_site=tuple(range(28)),
        sizes=SizeRules(32, frame_stride=8, frame_offset=1),
        linear=LinearWork.apart(2048, 4 * 2048, context=128),
        height=512, width=704, num_frames=161, steps=50,
    ),
    ModelShape(
        name="Lightricks/LTX-2", variant="ltx-2",
        heads=32, head_dim=128, block_of_site=tuple(range(48)),
        sizes=SizeRules(32, frame_stride=8, frame_offset=1),
        # Four projections between the video and the audio of half its width. The audio's own
        # layers are below 1 % and left out.
        linear=LinearWork(
            LinearWork.apart(4096, 4 * 4096, context=1024).per_token + 8 * 4096 * 2048,
            4 * 1024 * 4096**2,
        ),
        height=512, width=768, num_frames=121, steps=30,
    ),
    _cosmos1("nvidia/Cosmos-1.0-Diffusion-7B-Text2World", heads=32, layers=28),
    _cosmos1("nvidia/Cosmos-1.0-Diffusion-14B-Text2World", heads=40, layers=36),
    _cosmos2("nvidia/Cosmos-Predict2-2B-Video2World", heads=16, layers=28),
    _cosmos2("nvidia/Cosmos-Predict2-14B-Video2World", heads=40, layers=36),
    _cosmos2_image("nvidia/Cosmos-Predict2-2B-Text2Image", heads=16, layers=28),
    _cosmos2_image("nvidia/Cosmos-Predict2-14B-Text2Image", heads=40, layers=36),
    ModelShape(
        name="MiniMaxAI/MiniMax-H3", variant="minimax-h3",
        heads=56, head_dim=128, block_of_site=tuple(range(50)),
        sizes=SizeRules(
            32, frame_stride=17, frame_offset=5, latent_frames=(5, 2), frame_bounds=(124, 345)
        ),
        text_before=None,
        sound=Sound(latents_per_second=40, frames_per_second=24, channels=2),
        # The heads are wider than the model; the feed-forward has a gate.
        linear=LinearWork(8 * 5376 * 56 * 128 + 6 * 5376 * 14336),
        height=768, width=1344, num_frames=124,
    ),
    ModelShape(
        name="rhymes-ai/Allegro", variant="allegro",
        heads=24, head_dim=96, block_of_site=tuple(range(32)),
        sizes=SizeRules(16, frame_stride=4, frame_offset=0),
        linear=LinearWork.apart(2304, 4 * 2304, context=512),
        height=720, width=1280, num_frames=88, steps=100,
    ),
    _flux("black-forest-labs/FLUX.1-dev", steps=28),
    _flux("black-forest-labs/FLUX.1-schnell", steps=4, text_before=256),
    _flux("black-forest-labs/FLUX.1-Kontext-dev", steps=28),
    _flux2("black-forest-labs/FLUX.2-dev", heads=48, layers=56, steps=50),
    _flux2("black-forest-labs/FLUX.2-klein-4B", heads=24, layers=25, steps=4),
    _flux2("black-forest-labs/FLUX.2-klein-9B", heads=32, layers=32, steps=4),
    _flux2("black-forest-labs/FLUX.2-klein-base-4B", heads=24, layers=25, steps=50),
    _flux2("black-forest-labs/FLUX.2-klein-base-9B", heads=32, layers=32, steps=50),
    _qwen("Qwen/Qwen-Image"),
    _qwen("Qwen/Qwen-Image-Edit"),
    _qwen("Qwen/Qwen-Image-Edit-2509"),
    _qwen("Qwen/Qwen-Image-Edit-2511"),
    _image("lodestones/Chroma1-HD", variant="chroma", heads=24, layers=57, steps=35),
    _longcat("meituan-longcat/LongCat-Image"),
    _longcat("meituan-longcat/LongCat-Image-Edit"),
    _image(
        "AIDC-AI/Ovis-Image-7B", variant="ovis-image", heads=24, layers=33, text_before=256,
        linear=32, steps=50,
    ),
    _krea2("krea/Krea-2-Raw", steps=28),
    _krea2("krea/Krea-2-Turbo", steps=8),
    _z_image("Tongyi-MAI/Z-Image-Turbo", steps=9),
    _z_image("Tongyi-MAI/Z-Image", steps=50),
    _hunyuan_image("hunyuanvideo-community/HunyuanImage-2.1", steps=50),
    _hunyuan_image("hunyuanvideo-community/HunyuanImage-2.1-Distilled", steps=8),
    _image(
        "zai-org/CogView4-6B", variant="cogview-4", heads=32, layers=28, text_before=None, steps=50,
    ),
    ModelShape(
        name="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", variant="pixart",
        heads=16, head_dim=72, block_of_site=tuple(range(28)), sizes=SizeRules.images(16),
        linear=LinearWork.apart(1152, 4 * 1152, context=300),
        height=1024, width=1024, steps=20,
    ),
    _sd3("stabilityai/stable-diffusion-3-medium", heads=24, layers=24),
    _sd3("stabilityai/stable-diffusion-3.5-large", heads=38, layers=38),
)  # fmt: skip

PUBLISHED: dict[str, ModelShape] = {shape.name: shape for shape in _SHAPES}


def published_shape(name: str) -> ModelShape | None:
    """The shape of a published model by its repository id; None where it is not known.

    Repositories that hold the same weights for diffusers (`...-Diffusers`), and CogVideoX under its
    owner's former name, are found too.
    """
    plain = re.sub("-diffusers$", "", name, flags=re.IGNORECASE)
    return PUBLISHED.get(re.sub("^THUDM/", "zai-org/", plain))
