"""The suite's collection on the Hub: found by its title, filled in order, never made twice.

What is in it that is not ours stays, behind ours.

    >>> [move for move in moves(["b", "x", "a"], ["a", "b", "x"])]
    [('a', 0)]
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from huggingface_hub import Collection, HfApi

from .plan import Target
from .remote import Transient, Trouble

DESCRIPTION_LIMIT, NOTE_LIMIT = 150, 500  # characters, the Hub's


def sync_collection(api: HfApi, title: str, targets: list[Target], description: str = "") -> str:
    """Make the collection list the targets' repositories, in their order and with their notes; returns its slug.

    Reads before it writes, so that it can be repeated after any failure; if nothing is to do, it takes two requests.

    Raises:
        Trouble: two collections have this title; a text is too long for the Hub.
    """
    wanted = {target.repo_id: target.note for target in targets if target.branch == "main"}
    namespace = targets[0].repo_id.split("/")[0]
    if len(description) > DESCRIPTION_LIMIT or any(len(note) > NOTE_LIMIT for note in wanted.values()):
        raise Trouble(
            f"A collection's description has at most {DESCRIPTION_LIMIT} characters, a note {NOTE_LIMIT}: shorten."
        )
    collection = _find(api, title, namespace, description)
    for _ in range(2):  # what was written is read again
        if _in_order(collection, wanted):
            return collection.slug
        _write(api, collection, wanted)
        collection = api.get_collection(collection.slug)
    if not _in_order(collection, wanted):
        raise Transient(f"collection {collection.slug} does not become what it shall be")
    return collection.slug


def _find(api: HfApi, title: str, namespace: str, description: str) -> Collection:
    prefix = f"{namespace}/{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}"
    known = [one for one in api.list_collections(owner=namespace) if one.title == title and one.slug.startswith(prefix)]
    if len(known) > 1:
        raise Trouble(f"{namespace} has {len(known)} collections called {title!r}: delete all but one.")
    if not known:
        return api.create_collection(title, namespace=namespace, description=description or None)
    return api.get_collection(known[0].slug)  # a listing shows four items at most


def _in_order(collection: Collection, wanted: dict[str, str]) -> bool:
    ours = [(item.item_id, item.note or "") for item in collection.items[: len(wanted)]]
    return ours == list(wanted.items())


def _write(api: HfApi, collection: Collection, wanted: dict[str, str]) -> None:
    present = {item.item_id: item for item in collection.items if item.item_type == "model"}
    for repo_id, note in wanted.items():
        if repo_id not in present:
            collection = api.add_collection_item(collection.slug, repo_id, "model", note=note or None)
        elif (present[repo_id].note or "") != note:
            if not note:
                raise Trouble(
                    f"{repo_id} has a note in the collection, which the Hub's client cannot clear: write one."
                )
            api.update_collection_item(collection.slug, present[repo_id].item_object_id, note=note)
    objects = {item.item_id: item.item_object_id for item in collection.items}
    current = [item.item_id for item in collection.items]
    for repo_id, position in moves(current, [*wanted, *(name for name in current if name not in wanted)]):
        api.update_collection_item(collection.slug, objects[repo_id], position=position)


def moves(current: list[str], wanted: list[str]) -> Iterator[tuple[str, int]]:
    """The (item, position) moves, each taking an item out and putting it in, that turn one order into the other."""
    current = list(current)
    for position, name in enumerate(wanted):
        if current[position] != name:
            current.remove(name)
            current.insert(position, name)
            yield name, position
