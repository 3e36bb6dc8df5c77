"""`/openapi.json` names every route, and everything it refers to is there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rbee.jobs import JobRegistry, JobRunner
from tests.unit.http.http_stage import Stage, table


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "$ref":
                yield inner
            else:
                yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


async def test_description_names_every_route(stage: Stage) -> None:
    async with stage.get("/openapi.json") as response:
        told = await response.json()
    registry = JobRegistry.open(None)
    rows = table(registry, JobRunner(registry, actor="queen", owner="b", handlers={}))
    await registry.close()
    expected = {(row.method.lower(), row.path.replace(":path}", "}")) for row in rows} | {("get", "/openapi.json")}
    assert {(method, path) for path, item in told["paths"].items() for method in item} == expected


async def test_description_is_of_the_form_it_claims(stage: Stage) -> None:
    async with stage.get("/openapi.json") as response:
        told = await response.json()
    assert told["openapi"] == "3.1.0"
    assert told["info"].keys() >= {"title", "version"}
    for path, item in told["paths"].items():
        names = {part[1:-1] for part in path.split("/") if part.startswith("{")}
        for operation in item.values():
            assert operation["summary"]
            assert operation["responses"]
            parameters = operation.get("parameters", [])
            assert {parameter["name"] for parameter in parameters} == names
            assert all(parameter["required"] and parameter["in"] == "path" for parameter in parameters)
    for reference in references(told):
        where = told
        for name in reference.removeprefix("#/").split("/"):
            where = where[name]
        assert where


async def test_description_tells_the_errors_of_a_submit(stage: Stage) -> None:
    async with stage.get("/openapi.json") as response:
        submit = (await response.json())["paths"]["/v1/jobs"]["post"]
    assert set(submit["responses"]) == {"202", "400", "404", "409", "413", "415", "429", "507"}
    body = submit["requestBody"]["content"]["application/json"]["schema"]
    assert len(body["anyOf"]) == 7
    assert body["discriminator"]["propertyName"] == "operation"
