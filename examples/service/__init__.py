"""Trainings behind a web service: start, watch, answer and cancel them over HTTP.

    python examples/service [--backend process] [--port 8000] [--save-path DIR]

Trainings are kept in ``DIR``. When the service is started again, finished ones are listed with
their curves, and those that had not finished go on: to the same bits, from their last snapshot. A
cancelled training stays cancelled. A question that nobody answers in time goes on, so that it does
not keep others waiting.

- `settings`: the settings of a training, and the problems of a request.
- `trainers`: from settings to a trainer; module-level, so that worker processes can import it.
- `feed`: messages for readers that come and go, each at its own pace.
- `training`: the state of one training. `records`: what is kept of it on disk.
- `trainings`: one `fitloop.Runner` for the life of the service, and the trainings in it.
- `protection`: keeps foreign web pages away.
- `app`: the routes. ``page/`` is what a browser gets: HTML, style, and three scripts.
- `server`: the command line, and how the server ends.
"""
