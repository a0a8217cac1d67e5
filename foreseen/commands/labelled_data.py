"""What is said of labelled splits before a classifier is trained on them: missing labels, unknown classes, a leak."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator

    from foreseen.commands.session import Say
    from foreseen.config import Config
    from foreseen.data.leak import Leak
    from foreseen.data.shards import ShardSet


def say_unlabelled(shards: "ShardSet", say: "Say") -> None:
    """Say how many samples have no label, and name the first."""
    import numpy as np

    if shards.labels is None or not len(missing := np.flatnonzero(shards.labels < 0)):
        return
    say(
        f"{len(missing):,} of the {len(shards):,} pictures of split {shards.split!r} have no label and are left out, "
        f"such as {shards.describe(int(missing[0]))}"
    )


def look_at_test(config: "Config", shards: "ShardSet", accelerator: "Accelerator") -> "Leak | None":
    """Say before training that there will be no test score, where there is no test split, or a flattered one.

    Args:
        config: of the run.
        shards: the split that is trained on and chosen by.
        accelerator: its rank 0 speaks.

    Raises:
        BadInput: there is one, and none of it has a label, or a sample of it has one that training does not know.
    """
    from foreseen.commands.session import open_shards
    from foreseen.data.leak import find_leak
    from foreseen.errors import BadInput

    try:
        test = open_shards(config, config.data.test_split, accelerator)
    except BadInput as error:
        accelerator.print(f"there will be no test score: {error}")
        return None
    if test.labels is None or not (test.labels >= 0).any():
        raise BadInput(
            f"split {test.split!r} of {test.place} has no labels to be scored by; name a labelled one in "
            "data.test_split, or one that is not there, such as none, to train without a score"
        )
    largest = int(test.labels.argmax())
    if (label := int(test.labels[largest])) >= shards.num_classes:
        raise BadInput(
            f"{test.describe(largest)} of split {test.split!r} has the label {label}, and those of split "
            f"{shards.split!r} of {shards.place} are below {shards.num_classes}: pack both splits with the same classes"
        )
    leak = find_leak(shards, test)
    if leak.identical != 0:
        accelerator.print(describe_leak(leak, shards, test))
    return leak


def describe_leak(leak: "Leak", shards: "ShardSet", test: "ShardSet") -> str:
    """A sentence on the pictures that a test split shares with the one that is trained on, for logs and scores."""
    nearly = f"near-identical ones are found by `foreseen data check {test.place} --near-duplicates`"
    split = f"split {shards.split!r}"
    if leak.identical is None:
        return f"Whether test pictures are in {split} cannot be told, as an index has no checksums; {nearly}."
    if leak.such is None:
        return f"No test picture is, byte for byte, in {split}; {nearly}."
    return (
        f"LEAK: {leak.identical:,} of the {len(test):,} test pictures are, byte for byte, in {split} too, such as "
        f"{test.describe(leak.such)}, so the test score flatters; {nearly}."
    )
