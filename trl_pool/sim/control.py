"""The `/sim/` routes: switch faults on and off, and ask what has happened.

They are served on a port of their own, so they answer while the server proper is busy, hangs or refuses
connections.
"""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI, Response

from trl_pool.sim.app import SimApp
from trl_pool.sim.door import Door
from trl_pool.sim.faults import Fault


def create_control_app(sim: SimApp, door: Door) -> FastAPI:
    """The application behind the control port.

    Args:
        sim (`SimApp`):
            The server that is controlled.
        door (`Door`):
            The port at which it serves.
    """
    app = FastAPI(title="trl_pool.sim control")

    @app.post("/sim/faults", status_code=201)
    async def add_fault(fault: Fault) -> Any:
        unknown = set(fault.endpoints or ()) - set(sim.ledger.traits.endpoints)
        if unknown:
            known = list(sim.ledger.traits.endpoints)
            message = f"unknown endpoints {sorted(unknown)}; this dialect's are {known}"
            return Response(msgspec.json.encode({"detail": message}), 422, media_type="application/json")
        if fault.kind == "drop_idle":
            return {"dropped": door.drop_idle()}
        if fault.kind == "refuse":
            door.shut(fault.seconds or None)
        else:
            sim.faults.add(fault)
        return {"faults": sim.faults.listing()}

    @app.get("/sim/faults")
    async def list_faults() -> dict[str, Any]:
        return {"faults": sim.faults.listing()}

    @app.delete("/sim/faults", status_code=204)
    async def clear_faults() -> Response:
        sim.faults.clear()
        sim.gate.release()
        await door.open()
        return Response(status_code=204)

    @app.get("/sim/state")
    async def state() -> Response:
        found = {
            **sim.ledger.listing(),
            **sim.worker.state(),
            "listening": door.is_open,
            "connections": door.connections,
            "faults": sim.faults.listing(),
        }
        return Response(msgspec.json.encode(found), media_type="application/json")

    @app.delete("/sim/state", status_code=204)
    async def forget() -> Response:
        sim.ledger.forget()
        sim.worker.forget()
        return Response(status_code=204)

    return app
