"""The local Hub's collections: listing, creation, items with notes and positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .hub_routes import Reply, Request, route
from .hub_store import Refused

if TYPE_CHECKING:
    from .hub_server import LocalHub


@route("GET", "/api/collections")
def list_collections(hub: LocalHub, request: Request):
    owner = request.query.get("owner", [None])[0]
    found = [one for one in hub.state.collections.values() if owner in (None, one.owner)]
    allowed = [one for one in found if not one.private or hub.state.may_write(request.user, one.owner)]
    return Reply.of([one.json(listing=True) for one in allowed])


@route("POST", "/api/collections")
def create_collection(hub: LocalHub, request: Request):
    wanted = request.json()
    if not hub.state.may_write(request.user, wanted["namespace"]):
        raise Refused(403, f"You may not create a collection of {wanted['namespace']}")
    if len(wanted.get("description") or "") > 150:
        raise Refused(400, "description is longer than 150 characters")
    fields = (wanted["title"], wanted["namespace"], wanted.get("private", False), wanted.get("description"))
    return Reply.of(hub.state.create_collection(*fields).json())


@route("GET", "/api/collections/(?P<slug>[^/]+/[^/]+)")
def get_collection(hub: LocalHub, request: Request, slug):
    return Reply.of(hub.state.collection(slug, request.user).json())


@route("PATCH", "/api/collections/(?P<slug>[^/]+/[^/]+)")
def patch_collection(hub: LocalHub, request: Request, slug):
    one = hub.state.collection(slug, request.user, write=True)
    for name in ("title", "description", "private"):
        setattr(one, name, request.json().get(name, getattr(one, name)))
    return Reply.of({"data": one.json()})


@route("DELETE", "/api/collections/(?P<slug>[^/]+/[^/]+)")
def delete_collection(hub: LocalHub, request: Request, slug):
    del hub.state.collections[hub.state.collection(slug, request.user, write=True).slug]
    return Reply.of({})


@route("POST", "/api/collections/(?P<slug>[^/]+/[^/]+)/items")
def add_item(hub: LocalHub, request: Request, slug):
    one, wanted = hub.state.collection(slug, request.user, write=True), request.json()
    _check_note(wanted)
    one.add(wanted["item"]["type"], wanted["item"]["id"], wanted.get("note"))
    return Reply.of(one.json())


@route("PATCH", "/api/collections/(?P<slug>[^/]+/[^/]+)/items/(?P<item>[0-9a-f]+)")
def patch_item(hub: LocalHub, request: Request, slug, item):
    one, wanted = hub.state.collection(slug, request.user, write=True), request.json()
    _check_note(wanted)
    entry = one.items.pop(one.index(item))
    entry["note"] = wanted.get("note", entry["note"])
    one.items.insert(wanted.get("position", len(one.items)), entry)
    return Reply.of({"success": True})


@route("DELETE", "/api/collections/(?P<slug>[^/]+/[^/]+)/items/(?P<item>[0-9a-f]+)")
def delete_item(hub: LocalHub, request: Request, slug, item):
    one = hub.state.collection(slug, request.user, write=True)
    one.items.pop(one.index(item))
    return Reply.of({})


def _check_note(wanted: dict) -> None:
    if len(wanted.get("note") or "") > 500:
        raise Refused(400, "note is longer than 500 characters")
