"""The emoji denoiser: Qwen-Image's transformer, small, and the short sampler that training probes use."""

from collections.abc import Sequence

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn

from training.stills import CHANNELS, DOWNSAMPLING, PATCH
from training.text_encoder import WIDTH as TEXT_WIDTH
from training.vocabulary import PICTURE_SIZE

GRID = PICTURE_SIZE // DOWNSAMPLING // PATCH
TOKENS = GRID * GRID
TOKEN_CHANNELS = CHANNELS * PATCH**2
SHIFT = 3.0
STEPS = 8
GUIDANCE = 3.0


def build_transformer(width: int = 128, layers: int = 6) -> QwenImageTransformer2DModel:
    """Xavier blocks that start as the identity: modulation and the last projection are zero."""
    model = QwenImageTransformer2DModel(
        patch_size=PATCH,
        in_channels=TOKEN_CHANNELS,
        out_channels=CHANNELS,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(8, 12, 12),
    )
    for module in model.transformer_blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    zeroed = [model.proj_out, model.norm_out.linear]
    zeroed += [modulation[1] for b in model.transformer_blocks for modulation in (b.img_mod, b.txt_mod)]
    for module in zeroed:
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    return model


def predict(
    model: QwenImageTransformer2DModel, noisy: Tensor, sigma: Tensor, text: Tensor, mask: Tensor | None
) -> Tensor:
    """The velocity (noise minus picture), as the pipeline asks for it."""
    return model(
        hidden_states=noisy,
        timestep=sigma,
        encoder_hidden_states=text,
        encoder_hidden_states_mask=mask,
        img_shapes=[[(1, GRID, GRID)]] * len(noisy),
        return_dict=False,
    )[0]


def shifted_sigmas(steps: int, shift: float = SHIFT) -> list[float]:
    """The scheduler's noise levels, with the closing zero."""
    plain = torch.linspace(1, 1 / steps, steps)
    return [*(shift * plain / (1 + (shift - 1) * plain)).tolist(), 0.0]


def guide(conditional: Tensor, empty: Tensor, scale: float) -> Tensor:
    """True classifier-free guidance with the pipeline's rescaling to the conditional's norm."""
    combined = empty + scale * (conditional - empty)
    return combined * (conditional.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))


@torch.no_grad()
def sample_tokens(
    model: QwenImageTransformer2DModel,
    text: Tensor,
    mask: Tensor | None,
    empty: Tensor,
    noise: Tensor,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> Tensor:
    """Normalised latents as tokens; `empty` is the encoded empty prompt, (1, tokens, width)."""
    tokens, sigmas = noise, shifted_sigmas(steps)
    for now, after in zip(sigmas, sigmas[1:], strict=False):
        level = torch.full((len(tokens),), now, device=tokens.device)
        velocity = predict(model, tokens, level, text, mask)
        nothing = predict(model, tokens, level, empty.expand(len(tokens), -1, -1), None)
        tokens = tokens + (after - now) * guide(velocity, nothing, guidance)
    return tokens


def seeded_noise(seeds: Sequence[int]) -> Tensor:
    """One generator per picture, so that a picture does not depend on its batch."""
    rows = [torch.randn(TOKENS, TOKEN_CHANNELS, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(rows)
