"""One training step of BEiT without its tokenizer, and one forward of the tokenizers, against their peers.

    python benchmarks/beit_step.py [--model base] [--precision bf16] [--batch 8] [--rounds 7]

The step is forward, backward, AdamW on fixed images, masks and codes, 75 of 196 patches hidden, 8192 codes. Peers are
transformers' BeitForMaskedImageModeling and a plain loop over timm's Beit with a head on the hidden patches only. The
tokenizers are in float32, as codes must not change with a run's precision; VQ-KD's peers are the same ViT of timm and
of transformers with the same layers behind it, the dVAE's is transformers' copy of DALL-E's (FlavaImageCodebook).
The candidates take turns in one process, with the same threads,
precision and optimizer; a peer that documents a switch for its attention kernel runs with each. Compare the ratios, not
the times. Needs the extra `bench`.
"""

import argparse
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from race import OURS, Step, autocast, begin, race, report, set_attention, training_step
from torch import Tensor, nn

from foreseen.commands.verbs import load_recipe
from foreseen.data.batch import Batch
from foreseen.data.views import IMAGENET_MEAN, IMAGENET_STD, View
from foreseen.engine.launch import choose_attention
from foreseen.engine.objective import Progress
from foreseen.engine.optimizer import SteppedOptimizer
from foreseen.handoff.encoder import create_encoder
from foreseen.pretrain.beit import BEiT, Prepared
from foreseen.tokenizers.dvae import DVAE
from foreseen.tokenizers.tokenizer import Tokenizer
from foreseen.tokenizers.vqkd import VQKD

PATCHES, HIDDEN, CODES, SIZE = 196, 75, 8192, 224
MODELS = {"base": "beit_base_patch16_224", "large": "beit_large_patch16_224"}


class NoTokenizer(Tokenizer):
    """Stands where codes are given."""

    kind = "none"
    codebook_size, input_size, stride = CODES, (SIZE, SIZE), (16, 16)
    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def arguments(self) -> dict[str, object]:
        """None."""
        return {}

    def encode(self, images: Tensor) -> Tensor:
        """Never asked."""
        raise RuntimeError("codes are given")


def ours(name: str, images: Tensor, mask: Tensor, codes: Tensor, precision: str) -> Step:
    """The class and the optimizer that the recipe trains with."""
    size = len(images)
    given = [f"batch.global_size={size}", "optim.warmup_epochs=null", "run.steps=1000000", f"model.name={name}"]
    config = load_recipe("pretrain", "beit_b16", given)
    encoder = create_encoder(config.model, img_size=(SIZE, SIZE))
    objective = BEiT(encoder.model, NoTokenizer(), config.method, View("image", (SIZE, SIZE)))
    objective.to(images.device).train()
    choose_attention(objective, images.device)
    rules = objective.parameter_rules(None)
    optimizer = SteppedOptimizer(objective, rules, config.optim, global_size=size, total_steps=10**6)
    progress = Progress(0, 10**6, 1000.0, 0)
    position = torch.arange(size, device=images.device)
    batch = Batch(position, position * 0x9E3779B97F4A7C1 + 1, position, {"image": images}, draws={"mask": mask})
    prepared = Prepared(codes, mask.sum())
    state = {"step": 0}

    def step() -> Tensor:
        state["step"] += 1
        with autocast(precision, images.device):
            losses = objective(batch, prepared, progress)
        losses["loss"].backward()
        gradients = [p.grad for p in optimizer.parameters.values() if p.grad is not None]
        optimizer.step(state["step"], torch.isfinite(torch.nn.utils.get_total_norm(gradients)))
        return losses["loss"].detach()

    return step


class PlainBEiT(nn.Module):
    """What one would write with timm's Beit in an afternoon."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.vit = timm.create_model(
            name, num_classes=0, use_rel_pos_bias=False, use_shared_rel_pos_bias=True, drop_path_rate=0.0
        )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.vit.embed_dim))
        self.norm = nn.LayerNorm(self.vit.embed_dim)
        self.head = nn.Linear(self.vit.embed_dim, CODES)

    def forward(self, images: Tensor, mask: Tensor, codes: Tensor) -> Tensor:
        vit = self.vit
        x = vit.patch_embed(images)
        x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], dim=1)
        bias = vit.rel_pos_bias()
        for block in vit.blocks:
            x = block(x, shared_rel_pos_bias=bias)
        return F.cross_entropy(self.head(self.norm(x[:, 1:][mask])).float(), codes[mask])


def plain_timm(name: str, images: Tensor, mask: Tensor, codes: Tensor, precision: str, *, fused: bool) -> Step:
    """A plain loop over timm's Beit."""
    model = PlainBEiT(name).to(images.device).train()
    set_attention(model, fused)
    return training_step(model, lambda: model(images, mask, codes), precision, images.device)


def hugging_face(name: str, images: Tensor, mask: Tensor, codes: Tensor, precision: str, *, attention: str) -> Step:
    """transformers' BeitForMaskedImageModeling."""
    from transformers import BeitConfig, BeitForMaskedImageModeling

    vit = timm.create_model(name, num_classes=0)
    config = BeitConfig(
        vocab_size=CODES, hidden_size=vit.embed_dim, num_hidden_layers=len(vit.blocks), image_size=SIZE, patch_size=16,
        num_attention_heads=vit.blocks[0].attn.num_heads, intermediate_size=4 * vit.embed_dim, use_mask_token=True,
        use_shared_relative_position_bias=True, use_relative_position_bias=False, drop_path_rate=0.0,
        use_absolute_position_embeddings=False, attn_implementation=attention,
    )  # fmt: skip
    model = BeitForMaskedImageModeling(config).to(images.device).train()
    labels = codes[mask]
    return training_step(
        model, lambda: model(images, bool_masked_pos=mask, labels=labels).loss, precision, images.device
    )


def forward(encode: Callable[[Tensor], Tensor], images: Tensor) -> Step:
    """Codes without gradient."""

    def step() -> Tensor:
        with torch.no_grad():
            return encode(images)

    return step


class PlainVQKD(nn.Module):
    """A ViT, whoever's, with VQ-KD's layers behind it."""

    def __init__(self, patches: Callable[[Tensor], Tensor], vit: nn.Module, width: int) -> None:
        super().__init__()
        self.vit, self.patches = vit, patches
        self.task = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 32))
        self.codes = nn.Parameter(F.normalize(torch.randn(CODES, 32), dim=-1))

    def forward(self, images: Tensor) -> Tensor:
        z = F.normalize(self.task(self.patches(images)), dim=-1)
        return (z @ self.codes.mT).argmax(-1)


def timm_vqkd(device: torch.device, *, fused: bool) -> Callable[[Tensor], Tensor]:
    """timm's ViT-B/16."""
    vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    set_attention(vit, fused)
    return PlainVQKD(lambda images: vit.forward_features(images)[:, 1:], vit, 768).to(device).eval()


def hugging_face_vqkd(device: torch.device, attention: str) -> Callable[[Tensor], Tensor]:
    """transformers' ViT-B/16."""
    from transformers import ViTConfig, ViTModel

    vit = ViTModel(ViTConfig(attn_implementation=attention), add_pooling_layer=False)
    return PlainVQKD(lambda images: vit(images).last_hidden_state[:, 1:], vit, 768).to(device).eval()


def hugging_face_dvae(device: torch.device) -> Callable[[Tensor], Tensor]:
    """transformers' copy of DALL-E's encoder."""
    from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

    model = FlavaImageCodebook(FlavaImageCodebookConfig(freeze=False)).to(device).eval()
    return lambda images: model.get_codebook_indices(images)


def vqkd(device: torch.device) -> VQKD:
    """The tokenizer of `vqkd_b16`, with random weights."""
    vit = create_encoder(load_recipe("tokenizer", "vqkd_b16").model, img_size=(SIZE, SIZE)).model
    tokenizer = VQKD.around(vit, input_size=(SIZE, SIZE), codebook_size=CODES, code_dim=32).to(device).eval()
    choose_attention(tokenizer, device)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="base")
    args, device = begin(parser, batch=8)
    images = torch.randn(args.batch, 3, SIZE, SIZE, device=device)
    mask = torch.rand(args.batch, PATCHES, device=device).argsort(dim=1) < HIDDEN
    codes = torch.randint(CODES, (args.batch, PATCHES), device=device)
    given = MODELS[args.model], images, mask, codes, args.precision
    times = race(
        {
            OURS: ours(*given),
            "timm's Beit, fused attention": plain_timm(*given, fused=True),
            "timm's Beit, explicit attention": plain_timm(*given, fused=False),
            "transformers, sdpa": hugging_face(*given, attention="sdpa"),
            "transformers, eager": hugging_face(*given, attention="eager"),
        },
        args.rounds,
        device,
    )
    report(f"BEiT step, {MODELS[args.model]} {args.precision}", args.batch, times, device)

    small = images.clamp(-1, 1)
    own = vqkd(device)
    times = race(
        {
            OURS: forward(own.encode, small),
            "timm's ViT, fused attention": forward(timm_vqkd(device, fused=True), small),
            "timm's ViT, explicit attention": forward(timm_vqkd(device, fused=False), small),
            "transformers' ViT, sdpa": forward(hugging_face_vqkd(device, "sdpa"), small),
            "transformers' ViT, eager": forward(hugging_face_vqkd(device, "eager"), small),
        },
        args.rounds,
        device,
    )
    report("VQ-KD forward, ViT-B/16 fp32", args.batch, times, device)

    pixels = torch.rand(args.batch, 3, 112, 112, device=device) * 0.8 + 0.1
    dalle = DVAE().to(device).eval()
    times = race(
        {
            OURS: forward(dalle.encode, pixels),
            "transformers' FlavaImageCodebook": forward(hugging_face_dvae(device), pixels),
        },
        args.rounds,
        device,
    )
    report("dVAE forward, DALL-E at 112 px, fp32", args.batch, times, device)


if __name__ == "__main__":
    main()
