"""The encoder of diffusers' VAEs compiled, for GPUs: the same arithmetic, written so that compilers make good kernels.

`speed_up` is the way in. A shape is compiled when `prepare` asks for it, and compared with the plain encoder on the
pictures themselves; all other shapes, and decoding, stay with the plain one.
"""

import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D
from torch import Tensor, nn
from torch.nn.functional import silu

from families.compiled import keep_compiled
from schemas.console import log
from schemas.errors import first_line

_MOST_SHAPES = 64  # that are compiled in one process
_TOLERANCE = 5e-2  # largest relative difference from the plain encoder, both in bfloat16
_MOST_SCORES = 1 << 28  # of attention at once: 1 GiB


class FastEncoder:
    """A VAE's encoder that is compiled for the shapes that were prepared."""

    def __init__(self, encoder: Any, kept: Path, backend: str = "inductor") -> None:
        """What compilers make is kept in a folder for the next run."""
        keep_compiled(kept)
        self._plain = encoder.forward
        self._encoder = deepcopy(encoder).to(memory_format=torch.channels_last)  # 68 MB; the plain one is slower so
        self._compiled = torch.compile(encode, backend=backend, dynamic=False, fullgraph=True)
        self._shapes: dict[tuple[int, ...], bool] = {}  # that were tried -> whether they are used
        self._works = True
        self.seconds = 0.0  # that compiling took
        encoder.forward = self._forward

    @torch.no_grad()
    def prepare(self, values: Tensor) -> bool:
        """Have batches of this shape encoded by compiled code from now on, if it proves right on this one; say if so.

        What fails is told in one line, and nothing else is compiled then.
        """
        shape = tuple(values.shape)
        if shape in self._shapes or not self._works or len(self._shapes) == _MOST_SHAPES:
            return self._shapes.get(shape, False)
        self._shapes[shape] = False  # also while it is tried
        log.info("compiling the image encoder for batches of %d images of %dx%d", shape[0], shape[3], shape[2])
        begin = time.monotonic()
        wrong = self._wrong(values)
        self.seconds += time.monotonic() - begin
        if wrong is not None:
            log.warning("the compiled image encoder fails here (%s): the plain one is used", wrong)
            self._works = False
        self._shapes[shape] = wrong is None
        return wrong is None

    def _wrong(self, values: Tensor) -> str | None:
        """Compile for a shape and compare; say what is wrong, None if nothing is."""
        try:
            with torch._dynamo.config.patch(recompile_limit=_MOST_SHAPES):
                found = self._compiled(self._encoder, _dense(values))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as fault:
            return first_line(getattr(fault, "inner_exception", fault))  # a compiler's own
        expected = torch.cat([self._plain(one) for one in torch.split(values, 1)]).float()
        error = float((found.float() - expected).norm() / expected.norm())
        return None if error < _TOLERANCE else f"relative difference {error:.2g}"

    def _forward(self, values: Tensor) -> Tensor:
        if self._shapes.get(tuple(values.shape), False):
            encoded: Tensor = self._compiled(self._encoder, _dense(values))
        else:
            encoded = self._plain(values)
        return encoded


def speed_up(vae: Any, kept: Path) -> FastEncoder | None:
    """Give a loaded VAE an encoder that can be compiled; None where the plain one is to be used.

    That is on a CPU, in float32, with tiling, slicing or weights that wait on the CPU, and for encoders of other parts.
    """
    weights = list(vae.encoder.parameters())
    if not all(one.is_cuda and one.dtype == torch.bfloat16 for one in weights):
        return None
    if vae.use_tiling or vae.use_slicing or not is_known(vae.encoder):
        return None
    return FastEncoder(vae.encoder, kept)


def is_known(encoder: Any) -> bool:
    """Tell whether an encoder has the parts that `encode` computes with, and no others."""
    middle = encoder.mid_block
    resnets = [*(one for block in encoder.down_blocks for one in block.resnets), *middle.resnets]
    return (
        all(isinstance(block, DownEncoderBlock2D) for block in encoder.down_blocks)
        and all(isinstance(one, ResnetBlock2D) and isinstance(one.nonlinearity, nn.SiLU) for one in resnets)
        and isinstance(encoder.conv_act, nn.SiLU)
        and all(one is None or (one.heads == 1 and one.residual_connection) for one in middle.attentions)
    )


def encode(encoder: Any, values: Tensor) -> Tensor:
    """Compute what an encoder's own forward does."""
    states: Tensor = encoder.conv_in(values)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            states = _resnet(resnet, states)
        for downsample in block.downsamplers or ():
            states = downsample(states)
    middle = encoder.mid_block
    states = _resnet(middle.resnets[0], states)
    for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
        states = _resnet(resnet, states if attention is None else attend(attention, states))
    encoded: Tensor = encoder.conv_out(silu(normalise(encoder.conv_norm_out, states)).to(states.dtype))
    return encoded


def _resnet(resnet: Any, states: Tensor) -> Tensor:
    hidden = resnet.conv1(silu(normalise(resnet.norm1, states)).to(states.dtype))
    hidden = resnet.conv2(silu(normalise(resnet.norm2, hidden)).to(states.dtype))
    shortcut = states if resnet.conv_shortcut is None else resnet.conv_shortcut(states)
    together: Tensor = (shortcut + hidden) / resnet.output_scale_factor
    return together


def normalise(norm: nn.GroupNorm, states: Tensor) -> Tensor:
    """Compute a group norm, in float32: channels are summed apart, and then with those of their group.

    With channels last, sums over a row's columns read memory in its order, where those over groups would not. Squares
    are summed beside the values: what float32 loses by that is less than bfloat16 lost before.
    """
    batch, channels, height, width = states.shape
    values = states.permute(0, 2, 3, 1).float()  # batch × height × width × channels
    parted = (batch, height, norm.num_groups, -1)
    count = height * width * channels // norm.num_groups
    mean = values.sum(2).view(parted).sum((1, 3)) / count  # batch × groups
    square = values.square().sum(2).view(parted).sum((1, 3)) / count
    deviation = torch.rsqrt((square - mean.square()).clamp(min=0) + norm.eps)
    scale = deviation[:, :, None] * norm.weight.float().view(norm.num_groups, -1)
    shift = norm.bias.float().view(norm.num_groups, -1) - mean[:, :, None] * scale
    whole = (batch, 1, 1, channels)
    return (values * scale.view(whole) + shift.view(whole)).permute(0, 3, 1, 2)


def attend(attention: Any, states: Tensor) -> Tensor:
    """Compute an attention of one head over all positions of an image, and add what it was given.

    Heads are as wide as there are channels: too wide for flash attention, and slow in the kernel that takes its place.
    """
    batch, channels, height, width = states.shape
    tokens = normalise(attention.group_norm, states).to(states.dtype).permute(0, 2, 3, 1).reshape(batch, -1, channels)
    query, key, value = attention.to_q(tokens), attention.to_k(tokens), attention.to_v(tokens)
    rows = max(1, _MOST_SCORES // (height * width))
    images = []
    for number in range(batch):
        parts = [_mixed(part, key[number], value[number]) for part in torch.split(query[number], rows)]
        images.append(torch.cat(parts))
    mixed = attention.to_out[0](torch.stack(images)).view(batch, height, width, channels)
    together: Tensor = (mixed.permute(0, 3, 1, 2) + states) / attention.rescale_output_factor
    return together


def _mixed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Mix values, positions × width, by two products with a softmax in float32 between them."""
    if query.is_cuda and query.dtype != torch.float32:
        scores = torch.mm(query, key.T, out_dtype=torch.float32)
    else:  # a CPU's product has no other dtype than its factors
        scores = query.float() @ key.float().T
    shares = torch.softmax(scores * query.shape[-1] ** -0.5, dim=-1)
    return shares.to(value.dtype) @ value


def _dense(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last)
