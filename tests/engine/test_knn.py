import pytest
import torch

from foreseen.engine import knn as module
from foreseen.engine.knn import knn
from foreseen.engine.labelled import Labelled
from tests.golden_cases import load_case


@pytest.mark.parametrize("held_at_once", [None, 1000])
def test_the_authors_accuracies_come_out_in_chunks_of_any_size(
    held_at_once: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if held_at_once:
        monkeypatch.setattr(module, "_MAX_SIMILARITIES", held_at_once)
    case, tensors = load_case("dino", "knn")
    config = case["config"]
    found = knn(
        Labelled(tensors["in/train_features"], tensors["in/train_labels"]),
        Labelled(tensors["in/test_features"], tensors["in/test_labels"]),
        num_classes=config["num_classes"],
        neighbours=config["ks"],
        temperature=config["T"],
    )
    # The third number counts only classes that got a vote; the authors' own top-5 fills up with any.
    expected = {int(k): (top1, voted) for k, (top1, _, voted) in case["values"]["top1_top5"].items()}
    assert {k: (round(100 * a.top1, 9), round(100 * a.top5, 9)) for k, a in found.items()} == expected


def test_length_does_not_count_and_nearness_does() -> None:
    bank = Labelled(torch.tensor([[1.0, 0.0], [9.0, 5.0], [9.0, 5.1]]), torch.tensor([0, 1, 1]))
    judged = Labelled(torch.tensor([[100.0, 1.0]]), torch.tensor([0]))
    assert knn(bank, judged, num_classes=2, neighbours=[1, 3])[1].top1 == 1.0
    assert knn(bank, judged, num_classes=2, neighbours=[3])[3].top1 == 1.0  # one near vote outweighs two far ones
    assert knn(bank, judged, num_classes=2, neighbours=[3], temperature=100.0)[3].top1 == 0.0


@pytest.mark.parametrize(("size", "ks"), [(7, [7]), (30, [10, 20]), (200, [10, 20, 100, 200])])
def test_no_more_neighbours_vote_than_there_are(size: int, ks: list[int]) -> None:
    bank = Labelled(torch.eye(size), torch.arange(size) % 3)
    assert list(knn(bank, bank, num_classes=3)) == ks
