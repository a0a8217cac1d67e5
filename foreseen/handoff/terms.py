"""What is known of networks that others learned from: their terms, and the pictures that they were trained on.

A student keeps something of its teacher, so whoever passes it on must know the teacher's terms as well. What is not
known is said to be so, never left out.
"""

from collections.abc import Iterator, Mapping
from typing import Any

UNKNOWN = "unknown"


def terms_of(network: Mapping[str, Any]) -> list[str]:
    """The licences of a network, of the data behind it and of all that it began or learned from.

    Args:
        network: as `describe_parent` tells.

    Returns:
        Each once, sorted; "unknown" among them where any link of the chain does not say.
    """
    return sorted(set(_terms(network)))


def _terms(network: Mapping[str, Any]) -> Iterator[str]:
    lineage, own = _lineage(network), network.get("licence")
    if own:
        yield str(own)
    data = lineage.get("data")
    if isinstance(data, Mapping):
        yield str(data.get("licence") or UNKNOWN)
    elif not own:
        licences = lineage.get("licences")
        yield from map(str, licences if isinstance(licences, list) and licences else [UNKNOWN])
    for further in _before(lineage):
        yield from _terms(further)


def data_of(network: Mapping[str, Any]) -> list[str]:
    """What a network and all that it began or learned from were trained on, each once, the latest first."""
    return list(dict.fromkeys(_data(network)))


def _data(network: Mapping[str, Any]) -> Iterator[str]:
    lineage = _lineage(network)
    data = lineage.get("data")
    if isinstance(data, Mapping):
        where = data.get("source") or data.get("path") or "pictures that it does not name"
        yield f"{where} (split {data.get('split')}, {data.get('samples')} pictures)"
    else:
        yield UNKNOWN
    for further in _before(lineage):
        yield from _data(further)


def describe_teacher(teacher: Mapping[str, Any]) -> str:
    """A sentence or two on a teacher: what it is, its terms, what it was trained on."""
    method = _lineage(teacher).get("method")
    how = "" if method is None else f", trained by {method}"
    terms, data = terms_of(teacher), data_of(teacher)
    doubt = " Find out before you pass this model on." if UNKNOWN in terms else ""
    return (
        f"`{teacher['source']}` ({teacher['architecture']}{how}). Licence: {', '.join(terms)}. "
        f"Trained on: {'; '.join(data)}.{doubt}"
    )


def _lineage(network: Mapping[str, Any]) -> Mapping[str, Any]:
    found = network.get("lineage")
    return found if isinstance(found, Mapping) else {}


def _before(lineage: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Those that a lineage names; folders that others made may hold anything there."""
    for kind in ("parents", "teachers"):
        found = lineage.get(kind)
        yield from (entry for entry in (found if isinstance(found, list) else []) if isinstance(entry, Mapping))
