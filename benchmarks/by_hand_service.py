"""A web service whose trainings are hand-written loops in threads, each with a model of its own.

It answers the requests of `benchmarks.service_latency` and does nothing else: its latency is what
the interpreter allows beside two training threads.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from benchmarks import loops

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


class Training:
    """An endless training in a thread."""

    def __init__(self, number: int, model: Any) -> None:
        self.number, self.epoch, self.status, self._is_over = number, 0, "running", False
        threading.Thread(target=self._train, args=(model,), daemon=True).start()

    def _train(self, name: Any) -> None:
        from digits import make_loaders
        from service.settings import Settings
        from service.trainers import model_of

        torch.set_num_threads(1)
        model = model_of(Settings(model=name))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        train_dl, _valid_dl, _test_dl = make_loaders()
        while not self._is_over:
            loops.bare(model, optimizer, train_dl, epochs=1, keep_metrics=True)
            self.epoch += 1
        self.status = "cancelled"

    def cancel(self) -> None:
        self._is_over = True

    def answer(self) -> JSONResponse:
        return JSONResponse({"id": self.number, "status": self.status, "epoch": self.epoch})


trainings: list[Training] = []


async def begin(request: Request) -> JSONResponse:
    settings: dict[str, Any] = await request.json()
    trainings.append(Training(1 + len(trainings), settings["model"]))
    return trainings[-1].answer()


async def show(request: Request) -> JSONResponse:
    return trainings[int(request.path_params["number"]) - 1].answer()


async def cancel(request: Request) -> JSONResponse:
    training = trainings[int(request.path_params["number"]) - 1]
    answer = training.answer()
    training.cancel()
    return answer


app = Starlette(
    routes=[
        Route("/trainings", begin, methods=["POST"]),
        Route("/trainings/{number:int}", show),
        Route("/trainings/{number:int}", cancel, methods=["DELETE"]),
    ]
)

if __name__ == "__main__":
    uvicorn.run(app, port=0, access_log=False)
