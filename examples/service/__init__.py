"""Trainings behind a web service: start, watch, answer and cancel them over HTTP.

    python examples/service [--backend process] [--port 8000]

- `settings`: the settings of a training, and the problems of a request.
- `trainers`: from settings to a trainer; module-level, so that worker processes can import it.
- `feed`: messages for readers that come and go, each at its own pace.
- `trainings`: one `fitloop.Runner` for the life of the service, and the state of its jobs.
- `protection`: keeps foreign web pages away.
- `app`: the routes. ``page.html`` is all that a browser needs.
- `server`: the command line, and how the server ends.
"""
