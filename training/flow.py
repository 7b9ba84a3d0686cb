"""The emoji denoiser: Qwen-Image's transformer, small, and the defaults its pictures are made with."""

from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn

from training.stills import CHANNELS, DOWNSAMPLING, PATCH
from training.text_encoder import WIDTH as TEXT_WIDTH
from training.vocabulary import PICTURE_SIZE

GRID = PICTURE_SIZE // DOWNSAMPLING // PATCH
TOKEN_CHANNELS = CHANNELS * PATCH**2
SHIFT = 3.0
STEPS = 8
GUIDANCE = 1.5


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
    for name, parameter in model.named_parameters():
        if "_mod." in name or name.startswith(("proj_out.", "norm_out.")):
            nn.init.zeros_(parameter)
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
