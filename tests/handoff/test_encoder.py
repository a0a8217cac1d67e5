import json

import pytest
import timm
import torch

from foreseen import config
from foreseen.errors import BadInput
from foreseen.handoff import encoder as handoff
from foreseen.handoff.encoder import Preprocessing, create_encoder, load_encoder, save_encoder
from foreseen.models.backbone import create_backbone
from foreseen.models.position import resize_pos_embed

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
PREPROCESSING = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear", 0.9, (32, 32))
LINEAGE = {"parents": [], "licences": ["CC-BY-SA-4.0"], "seed": 3, "step": 20}


def vit(**options):
    size = options.pop("img_size", (32, 32))
    model = create_backbone("vit_tiny_patch16_224", img_size=size, args=TINY, drop_path_rate=0.2, **options)
    for parameter in model.parameters():  # norms and biases are not trivial after training
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def saved(tmp_path, model=None):
    save_encoder(model or vit(), tmp_path / "encoder", preprocessing=PREPROCESSING, lineage=LINEAGE)
    return tmp_path / "encoder"


def section(**values):
    return config.Model.model_validate(values)


@pytest.mark.parametrize("options", [{}, {"num_classes": 5, "pool": "mean"}, {"num_classes": 5, "pool": "token"}])
def test_timm_alone_gives_the_same_outputs(tmp_path, options):
    model = vit(**options)
    folder = saved(tmp_path, model)
    images = torch.randn(2, 3, 32, 32)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(loaded(images), model.eval()(images))
    data = timm.data.resolve_model_data_config(loaded)
    assert tuple(data["mean"]) == (0.5, 0.4, 0.3)
    assert tuple(data["std"]) == (0.2, 0.3, 0.4)
    assert data["input_size"] == (3, 32, 32)
    assert (data["interpolation"], data["crop_pct"]) == ("bilinear", 0.9)


def test_timm_gives_it_another_size_and_another_head(tmp_path):
    model = vit()
    loaded = timm.create_model(f"local-dir:{saved(tmp_path, model)}", pretrained=True, img_size=(48, 32), num_classes=4)
    assert loaded(torch.randn(1, 3, 48, 32)).shape == (1, 4)
    assert torch.equal(loaded.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.1])  # 0 and more give a ResNet other modules
def test_backbones_other_than_vits_are_handed_on_too(tmp_path, drop_path_rate):
    model = create_backbone("test_resnet", img_size=(32, 32), drop_path_rate=drop_path_rate)
    folder = saved(tmp_path, model)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3)
    assert loaded(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    begun = create_encoder(section(init_from=str(folder)), img_size=(64, 64), num_classes=3, pool="mean")
    assert begun.initialised.unused == ()
    assert all(name.startswith("fc.") for name in begun.initialised.fresh)


def test_what_was_saved_is_read_back(tmp_path):
    model = vit()
    read = load_encoder(saved(tmp_path, model))
    assert read.architecture == "vit_tiny_patch16_224"
    assert read.model_args.items() >= TINY.items()
    assert read.preprocessing == PREPROCESSING
    assert read.lineage == LINEAGE
    assert all(torch.equal(read.state[name], value) for name, value in model.state_dict().items())
    assert "CC-BY-SA-4.0" in (tmp_path / "encoder" / "README.md").read_text()


def test_the_names_of_its_classes_are_kept_where_they_are_known(tmp_path):
    names = [f"breed {number}" for number in range(5)]
    folder = tmp_path / "encoder"
    save_encoder(vit(num_classes=5), folder, preprocessing=PREPROCESSING, lineage=LINEAGE, class_names=names)
    assert load_encoder(folder).class_names == tuple(names)
    assert timm.create_model(f"local-dir:{folder}", pretrained=True).pretrained_cfg["label_names"] == names
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"label_names": names[:3]}))
    with pytest.raises(BadInput, match="label_names is no list of as many names"):
        load_encoder(folder)


def test_a_config_without_a_name_takes_the_folders_model(tmp_path):
    model = vit()
    begun = create_encoder(
        section(init_from=str(saved(tmp_path, model)), drop_path_rate=0.3),
        img_size=(64, 40),
        num_classes=7,
        pool="mean",
    )
    assert begun.model.eval()(torch.randn(1, 3, 64, 40)).shape == (1, 7)
    assert torch.equal(begun.model.pos_embed, resize_pos_embed(model.pos_embed, (4, 4), (8, 5), 1))
    assert begun.preprocessing == Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear", 0.9, (64, 40))
    assert begun.initialised.fresh == ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")


def test_saving_leaves_the_model_and_the_generators_alone(tmp_path):
    model = vit().double().train()
    before = torch.get_rng_state()
    saved(tmp_path, model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert model.cls_token.dtype == torch.float64


def test_an_older_folder_is_replaced_and_a_failed_one_changes_nothing(tmp_path, monkeypatch):
    first, second = vit(), vit()
    saved(tmp_path, first)
    monkeypatch.setattr(handoff, "_verify", lambda *_: (_ for _ in ()).throw(RuntimeError("differs")))
    with pytest.raises(RuntimeError, match="differs"):
        saved(tmp_path, second)
    assert torch.equal(load_encoder(tmp_path / "encoder").state["cls_token"], first.cls_token)
    monkeypatch.undo()
    saved(tmp_path, second)
    assert torch.equal(load_encoder(tmp_path / "encoder").state["cls_token"], second.cls_token)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def test_a_folder_that_timm_reads_otherwise_is_not_published(tmp_path):
    model = vit()
    model.norm.register_forward_hook(lambda _, __, output: output * 2)
    with pytest.raises(RuntimeError, match="another model"):
        saved(tmp_path, model)
    assert not list(tmp_path.iterdir())


def test_a_kill_between_the_renames_loses_nothing(tmp_path):
    folder = saved(tmp_path)
    folder.rename(tmp_path / ".encoder.old")
    saved(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def test_another_folder_is_not_overwritten(tmp_path):
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "thesis.tex").write_text("dear")
    with pytest.raises(BadInput, match="is no encoder folder"):
        saved(tmp_path)
    assert (tmp_path / "encoder" / "thesis.tex").read_text() == "dear"


def test_what_is_no_encoder_folder_is_refused_with_a_sentence(tmp_path):
    with pytest.raises(BadInput, match=r"is no encoder folder.*did you mean .*encoder\?"):
        load_encoder(saved(tmp_path).parent)
    with pytest.raises(BadInput, match="nowhere is no encoder folder"):
        load_encoder("nowhere")
    path = tmp_path / "encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BadInput, match="cannot be read"):
        load_encoder(tmp_path / "encoder")
    (tmp_path / "encoder" / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    with pytest.raises(BadInput, match="cannot be read"):
        load_encoder(tmp_path / "encoder")


def test_public_weights_are_taken_only_by_their_explicit_name(monkeypatch):
    public = timm.create_model("test_vit", num_classes=10)
    asked = []

    def create_model(name, pretrained=False, **options):
        if pretrained:
            asked.append(name)
            return public
        return original(name, pretrained=False, **options)

    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", create_model)
    begun = create_encoder(section(init_from="timm:test_vit.r160_in1k"), img_size=(96, 96), num_classes=3, pool="mean")
    assert asked == ["test_vit.r160_in1k"]
    assert torch.equal(begun.model.blocks[0].attn.qkv.weight, public.blocks[0].attn.qkv.weight)
    assert begun.preprocessing.mean == tuple(public.pretrained_cfg["mean"])
    with pytest.raises(BadInput, match="timm:vit_nowhere names no model"):
        load_encoder("timm:vit_nowhere")


def test_public_weights_that_cannot_be_had_are_a_sentence(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(BadInput, match="timm:vit_tiny_patch16_224 cannot be had: no route to host"):
        load_encoder("timm:vit_tiny_patch16_224")
