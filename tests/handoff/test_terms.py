"""What is said of a teacher: its terms and data, through every link, and "unknown" where one does not say."""

from typing import Any

from foreseen.handoff.terms import data_of, describe_teacher, terms_of


def _made_of(licence: str | None, **lineage: Any) -> dict[str, Any]:
    """What `describe_parent` tells of a run's encoder."""
    data = {"path": "shards/beasts", "split": "train", "samples": 37, "source": "beasts", "licence": licence}
    return {"source": "runs/x/encoder", "architecture": "vit", "licence": None, "lineage": {"data": data, **lineage}}


PUBLIC = {"source": "timm:test_vit.in1k", "architecture": "test_vit", "licence": "apache-2.0", "lineage": {}}


def test_terms_come_from_the_weights_the_data_and_all_before() -> None:
    first = _made_of("CC0", parents=[PUBLIC])
    assert terms_of(_made_of("CC-BY-4.0", parents=[], teachers=[first])) == ["CC-BY-4.0", "CC0", "apache-2.0"]


def test_a_link_that_does_not_say_makes_the_terms_unknown() -> None:
    assert terms_of(_made_of("CC0", parents=[_made_of(None)])) == ["CC0", "unknown"]
    assert terms_of({"source": "x", "licence": None, "lineage": {}}) == ["unknown"]
    assert terms_of({"source": "x", "licence": None, "lineage": {"licences": ["MIT"]}}) == ["MIT"]  # an imported one
    assert terms_of({"source": "x", "licence": None, "lineage": {"parents": "?", "teachers": [3]}}) == ["unknown"]


def test_a_teacher_is_described_with_what_it_has_seen() -> None:
    teacher = _made_of(None, method="supervised", parents=[PUBLIC])
    assert data_of(teacher) == ["beasts (split train, 37 pictures)", "unknown"]
    text = describe_teacher(teacher)
    assert "`runs/x/encoder` (vit, trained by supervised). Licence: apache-2.0, unknown." in text
    assert "Trained on: beasts (split train, 37 pictures); unknown." in text
    assert "Find out" in text
    assert "Find out" not in describe_teacher(PUBLIC)
