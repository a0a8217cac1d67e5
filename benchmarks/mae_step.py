"""One training step of MAE against its peers: forward, backward, AdamW, on the same fixed images.

    python benchmarks/mae_step.py [--model vit_small_patch16_224] [--precision bf16] [--batch 8] [--rounds 7]

The candidates take turns in one process, with the same threads, allocator, precision, fused optimizer and matmul
setting; a peer that documents a switch for its attention kernel runs with each, and only its best counts. Compare the
ratios, not the times. Needs the extra `bench`. Every candidate computes the function of the paper; none leaves out
more than the pixels of visible patches, which no loss looks at.
"""

import argparse

import timm
import torch
from race import OURS, Step, autocast, begin, race, report, set_attention, training_step
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from foreseen.commands.verbs import load_recipe
from foreseen.data.batch import Batch
from foreseen.engine.launch import choose_attention
from foreseen.engine.objective import Progress
from foreseen.engine.optimizer import SteppedOptimizer
from foreseen.pretrain.methods import METHODS

RATIO = 0.75


def ours(name: str, images: Tensor, precision: str) -> Step:
    """The class and the optimizer that the recipe trains with."""
    overrides = ["data.path=unused", f"batch.global_size={len(images)}", "optim.warmup_epochs=null"]
    config = load_recipe("pretrain", "mae_vit_b16", [*overrides, f"model.name={name}", "run.steps=1000000"])
    objective = METHODS["mae"].build(config).to(images.device)
    choose_attention(objective, images.device)
    rules = objective.parameter_rules(None)
    optimizer = SteppedOptimizer(objective, rules, config.optim, global_size=len(images), total_steps=10**6)
    progress = Progress(0, 10**6, 1000.0, 0)
    state = {"step": 0}

    def step() -> Tensor:
        number = state["step"] = state["step"] + 1
        position = torch.arange(len(images), device=images.device) + number * len(images)
        batch = Batch(position, position * 0x9E3779B97F4A7C1 + 1, position, {"image": images})
        with autocast(precision, images.device):
            losses = objective(batch, None, progress)
        losses["loss"].backward()
        gradients = [p.grad for p in optimizer.parameters.values() if p.grad is not None]
        optimizer.step(number, torch.isfinite(torch.nn.utils.get_total_norm(gradients)))
        return losses["loss"].detach()

    return step


class PlainMAE(nn.Module):
    """What one would write with timm's blocks in an afternoon, after the authors' dataflow."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.vit = timm.create_model(name, num_classes=0)
        patch = self.vit.patch_embed.patch_size[0]
        self.patch, self.num_patches = patch, self.vit.patch_embed.num_patches
        self.vit.pos_embed.requires_grad_(False)
        self.embed = nn.Linear(self.vit.embed_dim, 512)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 512))
        self.register_buffer("positions", torch.randn(1, self.num_patches + 1, 512) * 0.02)
        self.blocks = nn.Sequential(*(Block(512, 16, qkv_bias=True) for _ in range(8)))
        self.norm, self.pred = nn.LayerNorm(512), nn.Linear(512, patch * patch * 3)

    def forward(self, images: Tensor) -> Tensor:
        b, n, p = len(images), self.num_patches, self.patch
        grid = images.shape[-1] // p
        x = self.vit.patch_embed(images) + self.vit.pos_embed[:, 1:]
        order = torch.rand(b, n, device=x.device).argsort(dim=1)
        keep, restore = order[:, : int(n * (1 - RATIO))], order.argsort(dim=1)
        x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([(self.vit.cls_token + self.vit.pos_embed[:, :1]).expand(b, -1, -1), x], dim=1)
        x = self.embed(self.vit.norm(self.vit.blocks(x)))
        tokens = self.mask_token.expand(b, n - keep.shape[1], -1).to(x.dtype)
        tokens = torch.cat([x[:, 1:], tokens], dim=1).gather(1, restore[..., None].expand(-1, -1, 512))
        x = self.blocks(torch.cat([x[:, :1], tokens], dim=1) + self.positions)
        pred = self.pred(self.norm(x))[:, 1:]
        target = images.reshape(b, 3, grid, p, grid, p).permute(0, 2, 4, 3, 5, 1).reshape(b, n, -1)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        mask = (restore >= keep.shape[1]).to(torch.float32)
        return ((pred.float() - target).square().mean(-1) * mask).sum() / mask.sum()


def plain_timm(name: str, images: Tensor, precision: str, *, fused: bool) -> Step:
    """A plain loop over timm's blocks."""
    model = PlainMAE(name).to(images.device)
    set_attention(model, fused)
    return training_step(model, lambda: model(images), precision, images.device)


def hugging_face(name: str, images: Tensor, precision: str, *, attention: str) -> Step:
    """transformers' ViTMAEForPreTraining."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    vit = timm.create_model(name, num_classes=0)
    config = ViTMAEConfig(
        hidden_size=vit.embed_dim,
        num_hidden_layers=len(vit.blocks),
        num_attention_heads=vit.blocks[0].attn.num_heads,
        intermediate_size=4 * vit.embed_dim,
        patch_size=vit.patch_embed.patch_size[0],
        norm_pix_loss=True,
        attn_implementation=attention,
    )
    model = ViTMAEForPreTraining(config).to(images.device).train()
    return training_step(model, lambda: model(images).loss, precision, images.device)


def lightly(name: str, images: Tensor, precision: str, *, fused: bool) -> Step:
    """lightly's modules, put together as its documentation does."""
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

    vit = timm.create_model(name, num_classes=0)
    patch, length = vit.patch_embed.patch_size[0], vit.patch_embed.num_patches + 1
    backbone = MaskedVisionTransformerTIMM(vit=vit)
    decoder = MAEDecoderTIMM(vit.patch_embed.num_patches, patch, embed_dim=vit.embed_dim)
    model = nn.ModuleList([backbone, decoder]).to(images.device)
    set_attention(model, fused)

    def loss() -> Tensor:
        b = len(images)
        keep, hidden = utils.random_token_mask((b, length), mask_ratio=RATIO, device=images.device)
        x = decoder.embed(backbone.encode(images=images, idx_keep=keep))
        masked = utils.repeat_token(decoder.mask_token, (b, length))
        x = decoder.decode(utils.set_at_index(masked, keep, x.type_as(masked)))
        prediction = decoder.predict(utils.get_at_index(x, hidden))
        target = utils.get_at_index(utils.patchify(images, patch), hidden - 1)
        target = utils.normalize_mean_var(target, dim=-1)
        return nn.functional.mse_loss(prediction.float(), target)

    return training_step(model, loss, precision, images.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224")
    args, device = begin(parser, batch=8)
    images = torch.randn(args.batch, 3, 224, 224, device=device)
    candidates = {
        OURS: ours(args.model, images, args.precision),
        "timm blocks, fused attention": plain_timm(args.model, images, args.precision, fused=True),
        "timm blocks, explicit attention": plain_timm(args.model, images, args.precision, fused=False),
        "transformers, sdpa": hugging_face(args.model, images, args.precision, attention="sdpa"),
        "transformers, eager": hugging_face(args.model, images, args.precision, attention="eager"),
        "lightly, fused attention": lightly(args.model, images, args.precision, fused=True),
        "lightly, explicit attention": lightly(args.model, images, args.precision, fused=False),
    }
    times = race(candidates, args.rounds, device)
    report(f"{args.model} {args.precision}", args.batch, times, device)


if __name__ == "__main__":
    main()
