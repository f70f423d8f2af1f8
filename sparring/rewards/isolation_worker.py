"""The far end of isolation.py: loads one reward function and judges batches that come as JSON
lines.

Standard output is the channel to the parent; whatever the function prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any, BinaryIO

from sparring.errors import SparringError


def main() -> None:
    """Serve until the parent closes the channel."""
    channel = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    requests = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    function, is_object, hello = _load(json.loads(requests.readline()))
    _answer(channel, hello)
    knobs = {} if is_object else hello.get("knobs", {})
    for line in requests:
        request = json.loads(line)
        _answer(channel, _judge(function, request["arguments"], request["num_samples"], knobs))


def _load(request: dict[str, Any]) -> tuple[Any, bool, dict[str, Any]]:
    from sparring.rewards.registry import find
    from sparring.rewards.signatures import fit, parameters_of

    try:
        found, short_name = find(request["name"])
        function = fit(short_name, found, request["knobs"])
        parameters = parameters_of(function)
    except SparringError as error:
        return None, False, {"contract": str(error)}
    hello = {
        "short_name": short_name,
        "knobs": request["knobs"],
        "parameters": {
            "names": sorted(parameters.names),
            "required": sorted(parameters.required),
            "knobs": sorted(parameters.knobs),
            "takes_all": parameters.takes_all,
        },
    }
    return function, isinstance(found, type), hello


def _judge(
    function: Any, arguments: dict[str, Any], num_samples: int, knobs: dict[str, Any]
) -> dict[str, Any]:
    import asyncio
    import inspect

    from sparring.rewards.calling import CallLog, from_function, plain_values
    from sparring.rewards.signatures import parameters_of

    log = CallLog("", num_samples)
    parameters = parameters_of(function)
    for name, value in (("log_extra", log.log_extra), ("log_metric", log.log_metric)):
        if name in parameters.names or parameters.takes_all:
            arguments[name] = value
    try:
        values = function(**arguments, **knobs)
        if inspect.isawaitable(values):
            values = asyncio.run(_awaited(values))
    except SparringError as error:
        return {"contract": str(error)}
    except BaseException as error:  # foreign code: reported to the parent with its traceback
        trace = "".join(traceback.format_exception(from_function(error)))
        return {"traceback": trace, "kind": type(error).__name__}
    return {"values": plain_values(values), "extras": log.extras, "metrics": log.metrics}


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


def _answer(channel: BinaryIO, message: dict[str, Any]) -> None:
    data = memoryview(json.dumps(message, default=str).encode() + b"\n")
    while data:
        data = data[channel.write(data) :]
