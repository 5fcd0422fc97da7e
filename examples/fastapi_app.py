"""Trainings behind FastAPI: ``uvicorn --app-dir examples fastapi_app:app``, then open /docs."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from digits import make_trainer
from fastapi import Depends, FastAPI, HTTPException
from fastapi.sse import EventSourceResponse
from pydantic import PositiveInt

from fitloop import Job, JobEnded, Runner


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with Runner(max_concurrent=2) as app.state.runner:  # more trainings than two wait
        yield
        app.state.runner.cancel_all()


app = FastAPI(lifespan=lifespan)


def find_job(name: str) -> Job:
    jobs: dict[str, Job] = {job.name: job for job in app.state.runner.jobs}
    if name not in jobs:
        raise HTTPException(404, f"there is no training {name!r}")
    return jobs[name]


@app.post("/trainings", status_code=201)
async def start(epochs: PositiveInt = 20) -> dict[str, str]:
    job = app.state.runner.submit(make_trainer, epochs=epochs, verbose=False, progress=False)
    return {"name": job.name}


@app.delete("/trainings/{name}", status_code=202)
async def cancel(job: Annotated[Job, Depends(find_job)]) -> None:
    job.cancel()  # it ends after its current batch


@app.get("/trainings/{name}/events", response_class=EventSourceResponse)
async def follow(job: Annotated[Job, Depends(find_job)]) -> AsyncIterator[dict[str, Any]]:
    async with app.state.runner.events() as events:
        if job.status in ("waiting", "running"):  # else its last event was before this request
            async for event in events:
                if event.trainer == job.name:
                    yield event.as_dict()
                    if isinstance(event, JobEnded):
                        return
