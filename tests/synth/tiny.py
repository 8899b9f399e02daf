"""Tiny random models for tests: a folder of each family of priors, and a BatchNorm teacher."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    IFPipeline,
    LDMPipeline,
    StableDiffusionImageVariationPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    StableUnCLIPImg2ImgPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from stages.models.teacher import Teacher, mean_and_variance
from stages.synth.guidance import moments_gap


def tiny_tokenizer(words: Path) -> CLIPTokenizer:
    """CLIP's tokenizer over single letters; its files are written to ``words``."""
    words.mkdir(parents=True)
    letters = [chr(c) for c in range(97, 123)] + [","]
    vocabulary = letters + [x + "</w>" for x in letters] + ["<|startoftext|>", "<|endoftext|>"]
    (words / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(words, model_max_length=16)


def tiny_text_config(tokenizer: CLIPTokenizer, layers: int = 1) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def tiny_text_unet(**more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        **more,
    )


def save_stable_diffusion(
    folder: Path, prediction_type: str = "epsilon", vae: AutoencoderKL | AutoencoderDC | None = None
) -> Path:
    """A random 16-pixel ``StableDiffusionPipeline`` (latents 4 × 8 × 8) saved to ``folder``."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(folder.parent / f"{folder.name}-words")
    pipeline = StableDiffusionPipeline(
        vae=vae or tiny_vae(),
        unet=tiny_text_unet(),
        text_encoder=CLIPTextModel(tiny_text_config(tokenizer)),
        tokenizer=tokenizer,
        scheduler=tiny_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def save_stable_diffusion_dc(folder: Path) -> Path:
    """The same around a deep-compression autoencoder, which names its widths as Stable Diffusion's pipeline asks."""
    torch.manual_seed(0)
    vae = AutoencoderDC(
        latent_channels=4,
        encoder_block_out_channels=(8, 32),
        decoder_block_out_channels=(8, 32),
        encoder_layers_per_block=(0, 1),
        decoder_layers_per_block=(0, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    )
    vae.register_to_config(block_out_channels=[8, 32])
    return save_stable_diffusion(folder, vae=vae)


def save_stable_diffusion_xl(folder: Path) -> Path:
    """A random 16-pixel ``StableDiffusionXLPipeline``: two text encoders of width 16, pooled embedding of 16."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(folder.parent / f"{folder.name}-words")
    text = tiny_text_config(tokenizer, layers=2)
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_vae(),
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=4,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16 + 6 * 8,
        ),
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=tiny_scheduler(),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_vision_config(width: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        projection_dim=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        initializer_factor=20.0,  # of its class token: some spread among embeddings
    )


def save_image_variation(folder: Path) -> Path:
    """A random 16-pixel ``StableDiffusionImageVariationPipeline``: images cut to 16 of 20 pixels, one token of 16."""
    torch.manual_seed(0)
    pipeline = StableDiffusionImageVariationPipeline(
        vae=tiny_vae(),
        image_encoder=CLIPVisionModelWithProjection(tiny_vision_config(16)),
        unet=tiny_text_unet(),
        scheduler=tiny_scheduler(),
        safety_checker=None,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}),
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def save_unclip(folder: Path) -> Path:
    """A random 16-pixel ``StableUnCLIPImg2ImgPipeline``: images cut to 16 of 20 pixels, embeddings of 8 numbers."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(folder.parent / f"{folder.name}-words")
    vision = tiny_vision_config(8)
    normalizer = StableUnCLIPImageNormalizer(embedding_dim=8)
    normalizer.load_state_dict({"mean": 0.1 * torch.randn(1, 8), "std": 0.5 + torch.rand(1, 8)})
    pipeline = StableUnCLIPImg2ImgPipeline(
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}),
        image_encoder=CLIPVisionModelWithProjection(vision),
        image_normalizer=normalizer,
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=tokenizer,
        text_encoder=CLIPTextModel(tiny_text_config(tokenizer)),
        unet=tiny_text_unet(class_embed_type="projection", projection_class_embeddings_input_dim=16),
        scheduler=tiny_scheduler(),
        vae=tiny_vae(),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def save_if(folder: Path) -> Path:
    """A random ``IFPipeline`` of 16 pixels with a learned variance (6 channels out); T5 of width 16."""
    torch.manual_seed(0)
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(chr(c), -3.0) for c in range(97, 123)]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0)
    text = T5Config(vocab_size=len(vocabulary), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=6,
        block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        encoder_hid_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
    )
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", thresholding=True, sample_max_value=1.5, variance_type="learned_range"
    )
    pipeline = IFPipeline(tokenizer, T5EncoderModel(text), unet, scheduler, None, None, None, False)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def tiny_vae() -> AutoencoderKL:
    """16 × 16 pixels to latents 4 × 8 × 8."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.7,
    )


def save_dit(folder: Path, classes: int = 5) -> Path:
    """A random ``DiTPipeline`` of 16 pixels with a learned sigma (8 channels out) that knows ``classes`` classes."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=classes,
    )
    for parameter in transformer.parameters():  # its gates start at zero, which would hide class and time
        torch.nn.init.normal_(parameter, std=0.1)
    DiTPipeline(transformer, tiny_vae(), DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    return folder


def tiny_unet(channels: int, side: int) -> UNet2DModel:
    return UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def save_ldm(folder: Path) -> Path:
    """A random ``LDMPipeline`` (latents 3 × 8 × 8, VQ decoder) of 16 pixels."""
    torch.manual_seed(0)
    vqvae = VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=32,
        norm_num_groups=4,
        sample_size=16,
    )
    LDMPipeline(vqvae, tiny_unet(3, 8), DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    return folder


def save_ddpm(folder: Path, channels: int = 3) -> Path:
    """A random ``DDPMPipeline`` of 16 pixels."""
    torch.manual_seed(0)
    DDPMPipeline(tiny_unet(channels, 16), DDPMScheduler()).save_pretrained(folder)
    return folder


class TinyTeacher:
    """Stands in for :class:`stages.models.teacher.Teacher`: smooth, one BatchNorm, float64-capable."""

    batch_limit: int | None = None
    with_moments = Teacher.with_moments

    def __init__(self, classes: int = 2, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(1)
        self.convolution = nn.Conv2d(3, 6, 3, padding=1).to(dtype)
        self.head = nn.Linear(6, classes).to(dtype)
        self.num_classes, self.class_names, self.has_batchnorm = classes, tuple("ab"[:classes]), True
        self.batchnorms = [(torch.full((6,), 0.1, dtype=dtype), torch.full((6,), 0.5, dtype=dtype))]

    def with_batchnorm_inputs(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        inputs = self.convolution(x)
        mean, variance = (s.view(1, -1, 1, 1) for s in self.batchnorms[0])
        return self.head(torch.tanh((inputs - mean) / variance.sqrt()).mean((2, 3))), [inputs]

    def logits(self, x: Tensor) -> Tensor:
        return self.with_batchnorm_inputs(x)[0]


def feature_statistics(inputs: Sequence[Tensor], running: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """``moments_gap`` of BatchNorm inputs ``[n, c, ...]``, one a layer."""
    return moments_gap([mean_and_variance(x) for x in inputs], running)
