import pytest
import torch

from foreseen.errors import BadInput
from foreseen.models.backbone import create_backbone
from foreseen.models.initialise import initialise
from foreseen.models.position import resize_pos_embed
from foreseen.models.relative_position import resize_relative_position

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def vit(*, img_size=(32, 32), args=None, **options):
    return create_backbone("vit_tiny_patch16_224", img_size=img_size, args={**TINY, **(args or {})}, **options)


def test_a_pretrained_encoder_begins_a_classifier_as_mae_does():
    encoder, classifier = vit(), vit(num_classes=5, pool="mean")
    done = initialise(classifier, encoder.state_dict(), img_size=(32, 32), source="enc")
    assert done.fresh == ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")
    assert done.unused == ("norm.weight", "norm.bias")
    for name, value in encoder.state_dict().items():
        if not name.startswith("norm."):
            assert torch.equal(classifier.state_dict()[name], value)


def test_positions_are_resized_and_the_rest_carried_over():
    encoder, larger = vit(args={"reg_tokens": 2}), vit(img_size=(64, 40), args={"reg_tokens": 2})
    done = initialise(larger, encoder.state_dict(), img_size=(32, 32), source="enc")
    assert done.fresh == done.unused == ()
    expected = resize_pos_embed(encoder.pos_embed, (4, 4), (8, 5), 3)
    assert torch.equal(larger.pos_embed, expected)
    assert torch.equal(larger.norm.weight, encoder.norm.weight)


def test_a_turned_rectangle_of_as_many_patches_is_resized_too():
    tall, wide = vit(img_size=(64, 16)), vit(img_size=(16, 64))
    initialise(wide, tall.state_dict(), img_size=(64, 16), source="enc")
    assert torch.equal(wide.pos_embed, resize_pos_embed(tall.pos_embed, (8, 2), (2, 8), 1))


@pytest.mark.parametrize(("classes", "carried"), [(5, True), (7, False)])
def test_a_head_is_carried_over_only_for_as_many_classes(classes, carried):
    tuned, model = vit(num_classes=5, pool="mean"), vit(num_classes=classes, pool="mean")
    done = initialise(model, tuned.state_dict(), img_size=(32, 32), source="enc")
    assert ("head.weight" not in done.fresh) is carried
    assert not carried or torch.equal(model.head.weight, tuned.head.weight)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({"embed_dim": 48}, r"cls_token is \[1, 1, 24\] in enc and \[1, 1, 48\] in the model"),
        ({"depth": 3}, "enc has no blocks.2.norm1.weight, which the model needs .and 11 more"),
        ({"depth": 1}, "enc has blocks.1.norm1.weight, for which the model has no place .and 11 more"),
        ({"class_token": False, "global_pool": "avg"}, "cls_token|pos_embed"),
        ({"patch_size": 16}, "patch_embed.proj.weight is"),
    ],
)
def test_a_backbone_that_does_not_fit_is_named_and_left_alone(args, sentence):
    pool = args.pop("global_pool", None) and "mean"
    model, encoder = vit(args=args, pool=pool), vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(BadInput, match=sentence):
        initialise(model, encoder.state_dict(), img_size=(32, 32), source="enc")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


SHARED = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}


def beit(*, img_size=(32, 32), args=None, **options):
    tiny = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    model = create_backbone("beit_base_patch16_224", img_size=img_size, args={**tiny, **(args or {})}, **options)
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("size", [(32, 32), (48, 48), (32, 48), (16, 16)])
def test_beits_shared_table_is_copied_into_every_block_at_the_models_size(size):
    encoder, classifier = beit(args=SHARED), beit(img_size=size, num_classes=5, pool="mean")
    done = initialise(classifier, encoder.state_dict(), img_size=(32, 32), source="enc")
    assert done.fresh == ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")
    assert done.unused == ("norm.weight", "norm.bias")
    table = encoder.rel_pos_bias.relative_position_bias_table
    expected = resize_relative_position(table, (4, 4), (size[0] // 8, size[1] // 8))
    for block in classifier.blocks:
        assert torch.equal(block.attn.relative_position_bias_table, expected)
    assert torch.equal(classifier.blocks[1].gamma_2, encoder.blocks[1].gamma_2)


@pytest.mark.parametrize("args", [SHARED, {}, {**SHARED, "use_rel_pos_bias": True}, {"use_abs_pos_emb": True}])
def test_beits_own_tables_are_carried_over_and_resized(args):
    encoder, larger = beit(args=args), beit(args=args, img_size=(48, 48))
    done = initialise(larger, encoder.state_dict(), img_size=(32, 32), source="enc")
    assert done.fresh == done.unused == ()
    for name, value in larger.state_dict().items():
        if name.endswith("relative_position_bias_table"):
            assert torch.equal(value, resize_relative_position(encoder.state_dict()[name], (4, 4), (6, 6)))


def test_positions_behind_a_convolutional_stem_are_resized_too():
    def stem(img_size):
        args = {"patch_size": 2, "embed_dim": 24, "depth": 2, "num_heads": 3}
        return create_backbone("vit_tiny_r_s16_p8_224", img_size=img_size, args=args)

    encoder, larger = stem((32, 32)), stem((48, 64))
    done = initialise(larger, encoder.state_dict(), img_size=(32, 32), source="enc")
    assert done.fresh == done.unused == ()
    assert torch.equal(larger.pos_embed, resize_pos_embed(encoder.pos_embed, (4, 4), (6, 8), 1))


def test_tables_per_block_do_not_become_a_shared_one():
    with pytest.raises(BadInput, match=r"enc has no rel_pos_bias.relative_position_bias_table"):
        initialise(beit(args=SHARED), beit().state_dict(), img_size=(32, 32), source="enc")


@pytest.mark.parametrize(("img_size", "resized"), [((32, 32), False), ((64, 40), True)])
def test_a_plain_vit_begins_a_distilled_one_with_a_new_token_where_the_class_token_is(img_size, resized):
    encoder = vit()
    distilled = create_backbone("deit_tiny_distilled_patch16_224", img_size=img_size, num_classes=5, args=TINY)
    new = {name: value.clone() for name, value in distilled.state_dict().items()}
    done = initialise(distilled, encoder.state_dict(), img_size=(32, 32), source="enc")
    assert set(done.fresh) == {"dist_token", "head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
    assert done.unused == ()
    assert "enc has no distillation token" in done.notes[0]
    begun = distilled.state_dict()
    assert all(torch.equal(begun[name], new[name]) for name in done.fresh)
    carried = encoder.state_dict().items()
    assert all(torch.equal(begun[name], value) for name, value in carried if name != "pos_embed")
    own = encoder.pos_embed
    assert torch.equal(begun["pos_embed"][:, :2], torch.cat([own[:, :1], own[:, :1]], dim=1))
    patches = resize_pos_embed(own, (4, 4), (8, 5), 1) if resized else own
    assert torch.equal(begun["pos_embed"][:, 2:], patches[:, 1:])


def test_a_distilled_vit_begins_another_with_its_own_token_and_one_with_register_tokens_does_not_fit():
    distilled, other = (
        create_backbone("deit_tiny_distilled_patch16_224", img_size=(32, 32), num_classes=5, args=TINY) for _ in "ab"
    )
    done = initialise(other, distilled.state_dict(), img_size=(32, 32), source="enc")
    assert done.fresh == done.unused == done.notes == ()
    assert torch.equal(other.dist_token, distilled.dist_token)
    with pytest.raises(BadInput, match=r"pos_embed is \[1, 19, 24\] in enc and \[1, 18, 24\] in the model"):
        initialise(other, vit(args={"reg_tokens": 2}).state_dict(), img_size=(32, 32), source="enc")
