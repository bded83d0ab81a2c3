"""A trained diffusion UNet in ``diffusers.UNet2DModel``: a one-step consistency model of terrain, 128 x 128 heights.

The carrier is the wheel ``adaptive-terrain-diffusion`` 0.4.2 (ONNX). The network is OpenAI's ADM UNet: five levels of
32, 32, 64, 96 and 128 channels, four residual blocks each, and 28 self-attention layers on 1024, 256 and 64 tokens. It
has one channel, one scalar condition and no cross-attention.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.zoo.carriers import open_carrier

ONNX_FILE = "terrain_consistency_unet_difficulty100.onnx"
CHANNELS, PER_LEVEL, ATTENTION_LEVELS = (32, 32, 64, 96, 128), 4, (2, 3, 4)
LEVELS = len(CHANNELS)

_RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
# The convolution that a group norm feeds, and the name of that norm.
_NORM_OF = {".in_layers.2.weight": ".in_layers.0", ".out_layers.3.weight": ".out_layers.0", ".qkv.weight": ".norm"}


def adm_state_dict() -> dict[str, Tensor]:
    """Weights under the names of ADM; group norms, which the exporter made anonymous, are named by what they feed."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(open_carrier("terrain").read(ONNX_FILE)).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    state = {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
    # A norm is exported as Reshape, InstanceNormalization, Reshape, Mul, Add; the next convolution that can have one
    # in the order of execution is its own.
    waiting: list[tuple[Tensor, Tensor]] = []
    for i, node in enumerate(graph.node):
        if node.op_type == "InstanceNormalization":
            mul, add = graph.node[i + 3], graph.node[i + 4]
            if (mul.op_type, add.op_type) != ("Mul", "Add"):
                raise RuntimeError(f"a group norm in {ONNX_FILE} is followed by {mul.op_type} and {add.op_type}")
            waiting.append((tensors[mul.input[1]].flatten(), tensors[add.input[1]].flatten()))
        elif node.op_type == "Conv" and waiting:
            conv = node.input[1].removeprefix("network.")
            suffix = next((s for s in _NORM_OF if conv.endswith(s)), None)
            if suffix is None and conv != "out.2.weight":
                continue
            norm = "out.0" if suffix is None else conv.removesuffix(suffix) + _NORM_OF[suffix]
            (state[f"{norm}.weight"], state[f"{norm}.bias"]) = waiting.pop(0)
    if waiting:
        raise RuntimeError(f"{len(waiting)} group norms in {ONNX_FILE} feed no known convolution")
    return state


class _Renamer:
    """Collects parameters of ADM under their names in diffusers."""

    def __init__(self, adm: dict[str, Tensor]):
        self.adm, self.out = adm, dict[str, Tensor]()

    def copy(self, dst: str, src: str) -> None:
        for kind in ("weight", "bias"):
            if f"{src}.{kind}" in self.adm:
                self.out[f"{dst}.{kind}"] = self.adm[f"{src}.{kind}"]

    def resnet(self, dst: str, src: str) -> None:
        for name, old in _RESNET:
            self.copy(f"{dst}.{name}", f"{src}.{old}")

    def attention(self, dst: str, src: str) -> None:
        self.copy(f"{dst}.group_norm", f"{src}.norm")
        for kind in ("weight", "bias"):
            # One-dimensional convolutions of ADM are linear layers of diffusers.
            qkv, out = (self.adm[f"{src}.{m}.{kind}"] for m in ("qkv", "proj_out"))
            if kind == "weight":
                qkv, out = qkv.flatten(1), out.flatten(1)
            for name, part in zip(("to_q", "to_k", "to_v"), qkv.chunk(3), strict=True):
                self.out[f"{dst}.{name}.{kind}"] = part.clone()
            self.out[f"{dst}.to_out.0.{kind}"] = out

    def block(self, dst: str, src: str, j: int, level: int) -> None:
        self.resnet(f"{dst}.resnets.{j}", f"{src}.0")
        if level in ATTENTION_LEVELS:
            self.attention(f"{dst}.attentions.{j}", f"{src}.1")


def to_diffusers(adm: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of ADM under the names of ``diffusers.UNet2DModel``."""
    to = _Renamer(adm)
    to.copy("time_embedding.linear_1", "time_embed.0")
    to.copy("time_embedding.linear_2", "time_embed.2")
    to.copy("conv_in", "input_blocks.0.0")
    n = 1
    for level in range(LEVELS):
        for j in range(PER_LEVEL):
            to.block(f"down_blocks.{level}", f"input_blocks.{n}", j, level)
            n += 1
        if level < LEVELS - 1:
            to.resnet(f"down_blocks.{level}.downsamplers.0", f"input_blocks.{n}.0")
            n += 1
    to.resnet("mid_block.resnets.0", "middle_block.0")
    to.attention("mid_block.attentions.0", "middle_block.1")
    to.resnet("mid_block.resnets.1", "middle_block.2")
    n = 0
    for up, level in enumerate(reversed(range(LEVELS))):
        for j in range(PER_LEVEL + 1):
            to.block(f"up_blocks.{up}", f"output_blocks.{n}", j, level)
            if j == PER_LEVEL and level > 0:
                last = 2 if level in ATTENTION_LEVELS else 1
                to.resnet(f"up_blocks.{up}.upsamplers.0", f"output_blocks.{n}.{last}")
            n += 1
    to.copy("conv_norm_out", "out.0")
    to.copy("conv_out", "out.2")
    return to.out


class TerrainConsistency(nn.Module):
    """The consistency model: ``unet`` is a ``diffusers.UNet2DModel``, ``label`` embeds the scalar condition."""

    sigma_min, sigma_max, sigma_data = 0.002, 80.0, 0.5

    def __init__(self) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        attends = [level in ATTENTION_LEVELS for level in range(LEVELS)]
        self.unet = UNet2DModel(
            sample_size=128,
            in_channels=1,
            out_channels=1,
            block_out_channels=CHANNELS,
            layers_per_block=PER_LEVEL,
            down_block_types=tuple("AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attends)),
            norm_num_groups=32,
            norm_eps=1e-5,
            attention_head_dim=32,
            resnet_time_scale_shift="scale_shift",
            downsample_type="resnet",
            upsample_type="resnet",
            flip_sin_to_cos=True,
            freq_shift=0,
            time_embedding_type="positional",
            class_embed_type="identity",
            attn_norm_num_groups=32,
            add_attention=True,
        )
        self.label = nn.Sequential(nn.Linear(1, 128), nn.SiLU(), nn.Linear(128, 128))

    def forward(self, noisy: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        """Denoise in one step.

        Args:
            noisy: ``[B, 1, 128, 128]``.
            sigma: ``[B]``, standard deviation of the noise, 0.002 to 80.
            label: ``[B]``, difficulty in 0..1.

        Returns:
            ``[B, 1, 128, 128]`` in -1..1.
        """
        variance, s = self.sigma_data**2, sigma - self.sigma_min
        skip, out = variance / (s**2 + variance), s * self.sigma_data / (sigma**2 + variance).sqrt()
        scaled = noisy * (sigma**2 + variance).rsqrt().view(-1, 1, 1, 1)
        h = self.unet(scaled, 250 * sigma.log(), class_labels=self.label(label[:, None])).sample
        return (skip.view(-1, 1, 1, 1) * noisy + out.view(-1, 1, 1, 1) * h).clamp(-1, 1)

    @torch.inference_mode()
    def sample(self, n: int, difficulty: float = 50.0, seed: int = 0) -> Tensor:
        """``n`` height maps ``[n, 1, 128, 128]`` at a difficulty of 1 to 100, the same for the same seed."""
        weight = self.label[0].weight
        noise = torch.randn(n, 1, 128, 128, generator=torch.Generator().manual_seed(seed)) * self.sigma_max
        sigma, label = weight.new_full((n,), self.sigma_max), weight.new_full((n,), (difficulty - 1) / 99)
        return self(noise.to(weight), sigma, label)


def load() -> TerrainConsistency:
    """The model with its real weights, in evaluation mode.

    Raises:
        MissingWeights: the carrier is absent.
    """
    adm, model = adm_state_dict(), TerrainConsistency()
    model.unet.load_state_dict(to_diffusers(adm), strict=True)
    label = {k.removeprefix("label_emb."): v for k, v in adm.items() if k.startswith("label_emb.")}
    model.label.load_state_dict(label, strict=True)
    return model.eval()
