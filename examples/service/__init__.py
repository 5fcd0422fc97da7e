"""Trainings behind a web service: start, watch, answer and cancel them over HTTP.

    python examples/service [--backend process] [--port 8000]

- `settings`: what a training may be asked to do, and what is wrong with a request.
- `trainers`: from settings to a trainer; module-level, so that worker processes can import it.
- `feed`: what happened, for readers who come and go at their own pace.
- `trainings`: one `fitloop.Runner` for the life of the service, and what is known of its jobs.
- `app`: the routes. ``page.html`` is all that a browser needs.
- `server`: the command line, and how the server ends.
"""
